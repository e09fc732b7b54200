"""fusedres.compiler.ahead: binaries compiled in processes of their own, of which some hang and some crash."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fusedres.compiler.ahead import Made, compile_ahead, missing_of
from fusedres.compiler.known import compile_binary
from fusedres.compiler.targets import TARGETS
from tests.small_kernels import Binary, copy, matmul, specialise, triton

# Kernels whose compilation does, once its process has begun, what the name says.
HOSTILE = '''
import os, subprocess, sys, time
import triton
import triton.language as tl

if "worker.py" in sys.argv[-1]:
    from pathlib import Path
    with Path(__file__).with_name("pids").open("a") as file:
        print(os.getpid(), file=file)

class Acts:
    """A constant that acts when a compiler asks for what tells it apart."""
    def __init__(self, name):
        self.name = name
    def __repr__(self):
        return self.name
    def __hash__(self):
        return hash(self.name)
    def __eq__(self, other):
        return self.name == other.name
    @property
    def cache_key(self):
        if "worker.py" in sys.argv[-1]:
            if self.name == "hangs":
                child = subprocess.Popen(["sleep", "1000"])
                with Path(__file__).with_name("pids").open("a") as file:
                    print(child.pid, file=file)
                time.sleep(1000)
            if self.name == "exits":
                print("goodbye", file=sys.stderr, flush=True)
                os._exit(7)
            if self.name == "faults":
                import ctypes
                ctypes.string_at(0)
            if self.name == "raises":
                raise ArithmeticError("no")
            print("noise on what would be the pipe", flush=True)
        return self.name

@triton.jit
def hostile_kernel(y_ptr, ACT: tl.constexpr):
    tl.store(y_ptr, 1.0)
'''


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A module of such kernels that workers find by their path."""
    (tmp_path / "hostile_kernels.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import hostile_kernels

    hostile_kernels.__file__ = str(tmp_path / "hostile_kernels.py")
    yield hostile_kernels
    del sys.modules["hostile_kernels"]


def acting(module, name):
    y = torch.empty(1, device="meta")
    return Binary(
        module.hostile_kernel, specialise(module.hostile_kernel, {"y_ptr": y, "ACT": module.Acts(name)}), 4, 3
    )


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def none_left(tmp_path, at_least):
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert len(pids) >= at_least
    for _ in range(50):
        if not any(map(alive, pids)):
            return True
        time.sleep(0.1)
    return False


def compilations(monkeypatch):
    """Kernels that this process compiles, in a list that grows."""
    made = []

    def listener(*, src, cache_hit, **_):
        if not cache_hit:
            made.append(src.name)

    monkeypatch.setattr(triton.knobs.compilation, "listener", listener)
    return made


def test_what_was_compiled_ahead_is_not_compiled_again(tmp_path, monkeypatch):
    binaries = [copy(), copy(channels=47), matmul(), copy()]
    told = []
    made = compile_ahead(binaries, "sm_90", folder=tmp_path, jobs=2, progress=lambda *now: told.append(now))
    assert list(made) == [copy(), copy(channels=47), matmul()]
    assert all(one.error is None and one.seconds > 0.01 for one in made.values())
    assert told == [(1, 3), (2, 3), (3, 3)]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    counted = compilations(monkeypatch)
    for binary in binaries:
        assert "cubin" in compile_binary(binary, "sm_90").asm
    assert counted == []
    compile_binary(copy(block=(16, 64)), "sm_90")
    assert counted == ["copy_kernel"]  # the counter counts


def test_what_the_cache_holds_starts_no_process(tmp_path, monkeypatch):
    binaries = [copy(), copy(num_warps=8)]
    assert missing_of(binaries, "sm_90", folder=tmp_path) == binaries
    compile_ahead(binaries[:1], "sm_90", folder=tmp_path)
    assert missing_of(binaries, "sm_90", folder=tmp_path) == binaries[1:]
    assert missing_of(binaries, "sm_80", folder=tmp_path) == binaries

    def refused(*_, **__):
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refused)
    assert compile_ahead(binaries[:1], "sm_90", folder=tmp_path)[binaries[0]].error is None
    with pytest.raises(AssertionError, match="a process was started"):
        compile_ahead(binaries, "sm_90", folder=tmp_path)


def test_the_folder_is_left_as_the_cache_only_where_it_was_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "mine"))
    compile_ahead([copy()], "sm_90", folder=tmp_path / "theirs")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "mine") == triton.knobs.cache.dir
    assert list((tmp_path / "theirs").glob("*/copy_kernel.cubin"))
    assert not list((tmp_path / "mine").glob("*/copy_kernel.cubin"))


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_for_other_targets(tmp_path, target):
    assert compile_ahead([copy()], target, folder=tmp_path)[copy()].error is None
    assert list(tmp_path.glob(f"*/copy_kernel.{'hsaco' if TARGETS[target].backend == 'hip' else 'cubin'}"))


def test_a_compilation_that_hangs_is_ended_with_all_that_it_started(tmp_path, hostile):
    hangs, fine, good = (acting(hostile, name) for name in ("hangs", "fine", "good"))
    start = time.monotonic()
    made = compile_ahead([hangs, fine, good], "sm_90", folder=tmp_path / "cache", jobs=1, limit_s=3)
    assert made[hangs].error == "the compiler took longer than 3 s, and was ended"
    assert made[hangs].seconds >= 3
    assert made[fine].error is made[good].error is None
    assert time.monotonic() - start < 60
    assert none_left(tmp_path, at_least=3)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("exits", r"the compiler crashed \(status 7\): goodbye"),
        ("faults", rf"the compiler crashed \(signal {signal.SIGSEGV.value}\)"),
        ("raises", r"does not compile: ArithmeticError: no"),
    ],
)
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_compiler_that_fails_costs_one_binary_alone(tmp_path, hostile, name, error, jobs):
    bad, fine = acting(hostile, name), [acting(hostile, one) for one in ("fine", "good", "well")]
    made = compile_ahead([fine[0], bad, *fine[1:]], "sm_90", folder=tmp_path / "cache", jobs=jobs)
    assert made[bad].error is not None
    assert re.match(error, made[bad].error)
    assert [made[one].error for one in fine] == [None, None, None]
    assert none_left(tmp_path, at_least=1)


def test_a_worker_that_can_not_start_fails_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    made = compile_ahead([copy(), matmul()], "sm_90", folder=tmp_path, jobs=1)
    assert {one.error for one in made.values()} == {"the compiler crashed (status 1)"}


def test_a_kernel_that_no_other_process_finds(tmp_path, monkeypatch):
    local = triton.jit(copy_of_nothing)
    other = Binary(local, specialise(local, {"y_ptr": torch.empty(1, device="meta")}), 4, 3)
    made = compile_ahead([other, copy()], "sm_90", folder=tmp_path)
    assert "expected a kernel that its module" in made[other].error
    assert made[copy()].error is None


def copy_of_nothing(y_ptr):
    pass


def test_a_kernel_that_does_not_compile_says_why(tmp_path):
    wrong = matmul(precision="nonsense")
    made = compile_ahead([wrong], "sm_90", folder=tmp_path)
    assert made[wrong].error.startswith("does not compile: ")
    assert "input_precision" in made[wrong].error


INTERRUPTED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import hostile_kernels
from tests.compiler.test_ahead import acting
from fusedres.compiler.ahead import compile_ahead
hangs = acting(hostile_kernels, "hangs")
compile_ahead([hangs, acting(hostile_kernels, "exits"), acting(hostile_kernels, "fine")], "sm_90",
              folder=Path(sys.argv[1], "cache"), jobs=2)
"""


def test_ctrl_c_leaves_no_process_behind_and_no_main_guard_is_needed(tmp_path):
    (tmp_path / "hostile_kernels.py").write_text(HOSTILE)
    (tmp_path / "script.py").write_text(INTERRUPTED)
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": root},
        stderr=subprocess.PIPE,
    )
    pids = tmp_path / "pids"
    until = time.monotonic() + 90
    while time.monotonic() < until and not (pids.exists() and len(pids.read_text().split()) >= 2):
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert b"KeyboardInterrupt" in said
    assert none_left(tmp_path, at_least=2)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"jobs": 0}, "jobs: expected a positive number, got 0"),
        ({"limit_s": -1.0}, "limit_s: expected a positive number, got -1.0"),
    ],
)
def test_numbers_at_the_door(given, error):
    with pytest.raises(ValueError, match=error):
        compile_ahead([copy()], "sm_90", **given)


def test_an_unknown_target():
    with pytest.raises(ValueError, match="target: expected one of sm_80"):
        compile_ahead([copy()], "sm_91")


def test_nothing_to_do():
    assert compile_ahead([], "sm_90") == {}
    assert Made(None, 0.5).seconds == 0.5
