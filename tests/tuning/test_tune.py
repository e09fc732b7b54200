"""What tuning keeps, and what becomes of it where processes end, files are broken and disks are full."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import fusedres
from fusedres import cache
from fusedres.plan.gpus import GPUS
from fusedres.runtime import plans
from fusedres.tuning.tune import tuned_on
from tests.tuning.bench import FakeBench
from tests.tuning.process import BLOCKS, GPU

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def nothing_is_known():
    """No test goes by what another has found."""
    yield
    plans.forget()
    cache._said.clear()


def bench(**how):
    return FakeBench(BLOCKS, 7, interference=2.0, **how)


def tuned(path, made=None, **how):
    return tuned_on("model", BLOCKS, made or bench(), GPU, path, **how)


def started(folder, stage=0, seconds=0.0):
    command = [sys.executable, "-m", "tests.tuning.process", str(folder), str(stage), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_what_was_found_is_in_a_file_that_the_next_call_goes_by(tmp_path):
    path = tmp_path / "plan.json"
    first = tuned(path)
    assert first.path == path
    assert plans.default_for(GPU) is first.plan
    again = bench()
    second = tuned(path, again)
    assert again.calls == []  # nothing was measured
    assert second.step["tuned_ms"] == first.step["tuned_ms"]
    assert plans.read(path).decisions.entries == first.plan.decisions.entries
    assert sorted(file.name for file in tmp_path.iterdir()) == ["plan.json"]


def test_fresh_measures_again_and_keeps_what_is_known_of_others(tmp_path):
    path = tmp_path / "plan.json"
    tuned(path)
    other = FakeBench(BLOCKS[:1], 11)
    tuned_on("another", BLOCKS[:1], other, GPU, path)
    again = bench()
    found = tuned(path, again, fresh=True)
    assert {title for title, _ in again.calls} == {block.title for block in BLOCKS}
    assert set(found.plan.steps) == {"model", "another"}


def test_a_tuning_killed_for_good_goes_on_in_the_next_process(tmp_path):
    made = []
    tuned(tmp_path / "whole" / "plan.json", bench(at=made.append))
    whole = plans.read(tmp_path / "whole" / "plan.json")
    for stage in (1, len(made) // 2, len(made)):
        folder = tmp_path / str(stage)
        code, _, err = ended(started(folder, stage))
        assert code == -9, err
        assert not (folder / "plan.json").exists()  # nobody goes by half of it
        code, out, err = ended(started(folder))
        assert code == 0, err
        resumed = plans.read(folder / "plan.json")
        assert resumed.decisions.entries == whole.decisions.entries
        if stage > 1:
            assert int(out.split()[0]) < len(made)
        assert not list(folder.glob("*.part")) and not list(folder.glob("*.tmp"))


def test_of_two_processes_one_tunes_and_the_other_waits_and_reads(tmp_path):
    both = [started(tmp_path, seconds=0.05) for _ in range(2)]
    results = [ended(process) for process in both]
    assert [code for code, _, _ in results] == [0, 0], results
    made = sorted(int(out.split()[0]) for _, out, _ in results)
    assert made[0] == 0 and made[1] > 0


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'{"fusedres plan": 99}', b'{"fusedres plan": 1}'])
@pytest.mark.parametrize("name", ["plan.json", "plan.part"])
def test_a_broken_file_is_set_aside_said_once_and_made_anew(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.warns(UserWarning, match="set aside") as said:
        tuned(tmp_path / "plan.json")
    assert len([one for one in said if "fusedres" in str(one.message)]) == 1
    assert (tmp_path / f"{name}.bad").read_bytes() == content
    assert len(plans.read(tmp_path / "plan.json").blocks) == len(BLOCKS)


def test_a_plan_of_other_versions_under_this_name_is_not_gone_by(tmp_path):
    path = tmp_path / "plan.json"
    tuned(path)
    told = json.loads(path.read_text())
    told["made_with"]["torch"] = "1.0"
    path.write_text(json.dumps(told))
    again = bench()
    tuned(path, again)
    assert again.calls
    assert plans.read(path).made_with["torch"] == torch.__version__


def test_where_nothing_can_be_written_the_process_goes_by_its_memory(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="memory only") as said:
        found = tuned(tmp_path / "file" / "plan.json")
    assert len({str(one.message) for one in said}) == len(said)
    assert found.path is None
    assert plans.default_for(GPU) is found.plan


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, of 256 KiB."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("no file system can be mounted here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def fill(disk):
    with pytest.raises(OSError, match="No space"):
        (disk / "filler").write_bytes(b"x" * 2**20)


def test_on_a_full_disk_too(disk):
    fill(disk)
    before = sorted(file.name for file in disk.iterdir())
    with pytest.warns(UserWarning, match="memory only"):
        found = tuned(disk / "plan.json")
    assert found.path is None
    assert plans.default_for(GPU) is found.plan
    left = {file.name for file in disk.iterdir()} - set(before)
    assert left <= {"plan.lock"}


def test_a_disk_that_fills_up_later_leaves_the_old_plan_whole(disk):
    path = disk / "plan.json"
    tuned_on("little", BLOCKS[:1], FakeBench(BLOCKS[:1], 7), GPU, path)
    old = path.read_bytes()
    fill(disk)
    with pytest.warns(UserWarning, match="memory only"):
        assert tuned(path).path is None
    assert path.read_bytes() == old


def test_progress_is_told():
    told = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned(Path("/proc/nowhere/plan.json"), progress=told.append)
    assert told[-1].done == told[-1].of == len(BLOCKS)
    assert told[-1].gained_ms > 0


@pytest.mark.parametrize(
    ("model", "sample", "error", "words"),
    [
        ("resnet", torch.zeros(1), TypeError, "model: expected a torch.nn.Module, got str"),
        (nn.Linear(1, 1), "x", TypeError, "sample: expected a tensor, a tuple of arguments or keywords, got str"),
        (nn.Linear(1, 1), torch.zeros(1, 1), ValueError, "model, sample: expected both on one GPU, got cpu and cpu"),
    ],
)
def test_what_can_not_be_tuned_is_refused(model, sample, error, words):
    with pytest.raises(error, match=words):
        fusedres.tune(model, sample)


def test_a_plan_of_another_gpu_is_not_gone_by(tmp_path):
    path = tmp_path / "plan.json"
    tuned(path)
    assert plans.read(path).why_not(GPUS["a100"]) is not None
    assert plans.read(path).why_not(GPU) is None
