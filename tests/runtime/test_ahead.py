"""fusedres.runtime.ahead: what is missing is compiled in processes where that is worth them, by one process for all."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fusedres import cache as cache_module
from fusedres.compiler.ahead import missing_of
from fusedres.runtime import ahead, switches
from fusedres.runtime.ahead import LEAST, compile_missing, is_wanted
from tests.small_kernels import copy

BINARIES = [copy(block=(rows, 64)) for rows in (8, 16, 32, 64)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(ahead, "_looked_for", set())
    monkeypatch.setattr(cache_module, "_said", set())
    return tmp_path


@pytest.fixture
def handed(monkeypatch):
    """What `compile_ahead` is given, and compiles."""
    every, compile_ahead = [], ahead.compile_ahead

    def given(binaries, target):
        every.append((list(binaries), target))
        return compile_ahead(binaries, target)

    monkeypatch.setattr(ahead, "compile_ahead", given)
    return every


def test_what_is_missing_is_compiled_once(cache, handed):
    assert len(BINARIES) == LEAST
    compile_missing([*BINARIES, *BINARIES], "sm_90")
    assert handed == [(BINARIES, "sm_90")]
    assert missing_of(BINARIES, "sm_90") == []
    compile_missing(BINARIES, "sm_90")
    assert len(handed) == 1


def test_a_few_are_left_to_the_launch(cache, handed):
    compile_missing(BINARIES[1:], "sm_90")
    assert handed == []
    assert missing_of(BINARIES, "sm_90") == BINARIES


def test_a_failure_is_said_once_and_ends_nothing(cache, monkeypatch):
    def refused(*_, **__):
        raise OSError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", refused)
    with pytest.warns(UserWarning, match=r"compiled one after the other \(OSError: no more processes\)"):
        compile_missing(BINARIES, "sm_90")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile_missing([copy(block=(rows, 32)) for rows in (8, 16, 32, 64)], "sm_90")


def test_where_it_is_wanted(monkeypatch):
    monkeypatch.setattr(ahead, "look_into_folders", lambda index: None)
    monkeypatch.setattr(ahead, "target_name", lambda index: {0: "sm_90", 1: "sm_75"}[index])
    monkeypatch.setattr(ahead, "cores", lambda: 2)
    assert is_wanted(torch.device("cuda:0"))
    assert not is_wanted(torch.device("cuda:1"))
    assert not is_wanted(torch.device("cpu")) and not is_wanted(torch.device("meta"))
    monkeypatch.setattr(ahead, "cores", lambda: 1)
    assert not is_wanted(torch.device("cuda:0"))
    monkeypatch.setattr(ahead, "cores", lambda: 2)
    monkeypatch.setattr(switches, "PARALLEL_COMPILE", False)
    assert not is_wanted(torch.device("cuda:0"))


def test_the_variable_that_turns_it_off():
    assert switches.PARALLEL_COMPILE
    told = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "FUSEDRES_PARALLEL_COMPILE": "0"}
    code = "from fusedres.runtime import switches; print(switches.PARALLEL_COMPILE)"
    done = subprocess.run([sys.executable, "-c", code], env=told, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# No guard of its __main__, as scripts and notebooks have none: nothing may run it again.
RANK = """
import sys
sys.path.insert(0, sys.argv[1])
print("begun")
import hostile_kernels
from tests.compiler.test_ahead import acting
from fusedres.runtime.ahead import compile_missing
compile_missing([acting(hostile_kernels, f"rank {i}") for i in range(4)], "sm_90")
print("done")
"""


def test_processes_with_one_cache_compile_each_binary_once(tmp_path):
    from tests.compiler.test_ahead import HOSTILE

    logged = HOSTILE.replace(
        'print("noise on what would be the pipe", flush=True)',
        'open(os.path.join(os.path.dirname(__file__), "compiled"), "a").write(f"{self.name} {os.getppid()}\\n")',
    )
    assert logged != HOSTILE
    (tmp_path / "hostile_kernels.py").write_text(logged)
    (tmp_path / "rank.py").write_text(RANK)
    told = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "rank.py"), str(tmp_path)], env=told, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    assert [rank.communicate(timeout=240)[0].split() for rank in ranks] == [["begun", "done"]] * 2
    lines = [line.rsplit(" ", 1) for line in (tmp_path / "compiled").read_text().splitlines()]
    assert {name for name, _ in lines} == {f"rank {i}" for i in range(4)}
    assert len({parent for _, parent in lines}) == 1  # one of them compiled for both
    assert len(list((tmp_path / "cache").glob("*/hostile_kernel.cubin"))) == 4
