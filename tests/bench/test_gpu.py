"""`make gpu`: parts stand on their own, know when to stop, are gone on with, and name only what there is."""

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fusedres.bench import gpu, launches, session
from fusedres.bench.contenders import contenders_named
from fusedres.bench.gpu import FAILED, INTERRUPTED, LEFT_OUT, PASSED, TIMED_OUT, Runner
from fusedres.bench.launches import Writer
from fusedres.bench.parts import ESSENTIAL_SECONDS, Outcome, Part, dry_parts, real_parts
from fusedres.bench.rows import new_table, read_rows
from fusedres.bench.setting import device_named
from fusedres.bench.summary import compose, rows_of_parts, write
from fusedres_cli.main import parser
from tests.bench.tiny import CPU, row
from tests.timed_launches import timed
from tests.vgpu_support import needs_vgpu

ROOT = Path(__file__).parents[2]
BIG, SMALL = 80 * 10**9, 12 * 10**9


def part(name: str, code: str = "pass", **attributes) -> Part:
    return Part(name, "for tests", attributes.pop("limit", 60), ((sys.executable, "-c", code),), **attributes)


def test_a_part_that_fails_does_not_keep_the_next_from_running(tmp_path):
    runner = Runner(tmp_path, "abc", {"FROM_HERE": "x"})
    said = "import os; print(os.environ['FROM_HERE'])"
    parts = [
        part("first", "raise SystemExit(5)"),
        part("second", said),
        part("third", needs=("no-such-tool", "buy it")),
    ]
    assert not runner.run(parts)
    assert {name: one.status for name, one in runner.outcomes.items()} == {
        "first": FAILED, "second": PASSED, "third": LEFT_OUT,
    }  # fmt: skip
    assert "exit status 5" in runner.outcomes["first"].reason
    assert runner.outcomes["third"].reason == "no-such-tool is not installed: buy it"
    assert "x\n" in (tmp_path / "second.log").read_text()


def test_a_part_that_takes_too_long_is_interrupted_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PATIENCE", 5.0)
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(77)'])"
    listens = f"try: {child}\nexcept KeyboardInterrupt: print('wrote what there was')"
    start = time.monotonic()
    runner = Runner(tmp_path, "abc", {})
    assert not runner.run([part("slow", listens, limit=2)])
    assert time.monotonic() - start < 20
    assert runner.outcomes["slow"].status == TIMED_OUT
    assert "wrote what there was" in (tmp_path / "slow.log").read_text()


def test_a_part_that_does_not_listen_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PATIENCE", 1.0)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(77)"
    start = time.monotonic()
    assert not Runner(tmp_path, "abc", {}).run([part("deaf", deaf, limit=1)])
    assert time.monotonic() - start < 20


def counting(path: Path) -> str:
    return f"open({str(path)!r}, 'a').write('x')"


@pytest.mark.parametrize(
    ("commit", "fresh", "runs"), [("abc", False, 1), ("abc", True, 2), ("def", False, 2), ("abc+", False, 2)]
)
def test_what_passed_is_not_run_again_for_the_same_commit(tmp_path, commit, fresh, runs):
    count = tmp_path / "count"
    first = "abc+" if commit == "abc+" else "abc"
    assert Runner(tmp_path, first, {}).run([part("once", counting(count))])
    assert Runner(tmp_path, commit, {}, fresh=fresh).run([part("once", counting(count))])
    assert count.read_text() == "x" * runs


def test_what_failed_is_run_again_and_resumes(tmp_path):
    said = "import sys; print(sys.argv[1:]); sys.exit(len(sys.argv) < 2)"
    assert not Runner(tmp_path, "abc", {}).run([part("again", said, resumes=True)])
    assert Runner(tmp_path, "abc", {}).run([part("again", said, resumes=True)])
    assert "['--resume']" in (tmp_path / "again.log").read_text()


def test_a_lost_gpu_is_gone_on_with_in_a_new_process(tmp_path):
    count = tmp_path / "count"
    lost = f"{counting(count)}; import sys; sys.exit({gpu.DEVICE_LOST} if len(open({str(count)!r}).read()) < 3 else 0)"
    assert Runner(tmp_path, "abc", {}).run([part("lost", lost, resumes=True)])
    assert count.read_text() == "xxx"
    count.write_text("")
    assert not Runner(tmp_path, "abc", {}).run([part("lost for good", f"raise SystemExit({gpu.DEVICE_LOST})")])


def test_an_interruption_is_kept_account_of(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    runner = Runner(tmp_path, "abc", {})
    monkeypatch.setattr(runner, "call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run([part("one")])
    assert json.loads((tmp_path / "parts.json").read_text())["one"]["status"] == INTERRUPTED


# A command of its own; without it the part fails, and says so.
TUNE = importlib.util.find_spec("fusedres.commands.tune")

EVERY = {
    "H100": real_parts(Path("out"), "sm_90", BIG), "small": real_parts(Path("out"), "sm_86", SMALL),
    "dry": dry_parts(Path("out"), "vgpu:sm_90"),
}  # fmt: skip


@pytest.mark.parametrize("machine", ["H100", "small"])
def test_the_essential_parts_take_eight_minutes_at_most(machine):
    essential = [one for one in EVERY[machine] if one.essential]
    assert sum(one.limit for one in essential) <= ESSENTIAL_SECONDS
    assert EVERY[machine][: len(essential)] == tuple(essential)
    assert [one.name for one in essential] == ["doctor", "tune", "launches", "headline"]
    for kind in ("parity", "ladder", "kernels", "bounds", "compile"):
        assert any(one.name.startswith(kind) for one in EVERY[machine]), kind


def test_the_headline_is_of_what_was_tuned_and_its_launches_are_measured():
    doctor, tune, launches, headline = EVERY["H100"][:4]
    assert doctor.commands[-2][1:] == ("-m", "fusedres", "doctor", "--kernels", "--device", "cuda")
    assert tune.commands[0][1:] == ("-m", "fusedres", "tune", "resnet50", "--batch", "256", "--dtype", "bf16")
    for one in (launches, headline):
        told = " ".join(one.commands[0])
        assert "--model resnet50 --batch 256 --dtype bf16" in told and one.resumes
    assert "--contenders eager,compile,tuned " in " ".join(headline.commands[0])


def test_a_step_of_the_dry_run_that_needs_a_gpu_says_so(tmp_path):
    tune = next(one for one in EVERY["dry"] if one.name == "tune")
    assert Runner(tmp_path, "abc", {}).run([tune])
    assert "a plan is measured on a GPU" in (tmp_path / "parts.json").read_text()


@pytest.mark.parametrize("machine", ["H100", pytest.param("small", marks=pytest.mark.slow), "dry"])
def test_commands_name_only_what_there_is(machine):
    assert len({one.name for one in EVERY[machine]}) == len(EVERY[machine])
    for one in EVERY[machine]:
        for command in one.commands:
            if command[2] == "fusedres.bench.launches":
                resumed = [*command[3:], *(["--resume"] if one.resumes else [])]
                assert launches._parser().parse_args(resumed).csv.name == "launches.csv"
            if command[1:3] != ("-m", "fusedres") or (command[3] == "tune" and TUNE is None):
                continue
            options = parser().parse_args([*command[3:], *(["--resume"] if one.resumes else [])])
            if options.command == "bench":
                given = {name: getattr(options, name) for name in session.BenchOptions.__dataclass_fields__}
                assert session.comparisons(session.BenchOptions(**given), CPU)
                assert contenders_named(options.contenders)


def test_without_a_gpu_there_is_an_error_that_names_the_dry_run(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path)]) == 2
    message = "device: expected a GPU (PyTorch sees none here), got '{}'; DRY=1 runs every step without one"
    assert message.format("cpu") in capsys.readouterr().err
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert message.format("cuda") in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "message"), [("cpu", "a GPU (cuda:0, cuda:1)"), ("cuda:2", "cpu, cuda, ")])
def test_a_gpu_that_is_not_there_is_refused(name, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert gpu.main(["--device", name, "--out", str(tmp_path / "out")]) == 2
    refusal = capsys.readouterr().err
    assert f"device: expected {message}" in refusal and f"got '{name}'" in refusal
    assert list(tmp_path.iterdir()) == []


@needs_vgpu
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "headlines"], "parts: expected one such as headline"),
        (["--out", "/proc/x"], "out: expected a folder that can be written, got /proc/x"),
    ],
)
def test_impossible_arguments_are_refused_before_anything_runs(arguments, message, capsys, tmp_path):
    assert gpu.main(["--dry", "--out", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_first_page_is_the_table_of_predicted_against_measured(tmp_path):
    found = timed()
    Writer(tmp_path / "launches.csv", found).close()
    write(tmp_path, [part("kernels")], {}, CPU)
    text = (tmp_path / "summary.md").read_text()
    assert text.index("## Predicted against measured") < text.index("| step | launch |") < text.index("## Parts")
    assert "| not run yet |" in text and f"`fusedres calibrate {tmp_path}`" in text
    first = max((row for row in found), key=lambda row: row.count * abs(row.measured_s - row.predicted_s))
    after = text[text.index("| step | launch |") :].splitlines()[2]
    assert after.startswith(f"| {first.step} | {first.name} | {first.tile} | {first.operands} | {first.count} |")


def test_rows_of_all_parts_are_gathered_and_timed_ones_preferred(tmp_path):
    for name, rows in {
        "a": [row(median_s=None), row("eager")], "b": [row(), row("eager", median_s=1.0), row("compile")],
    }.items():  # fmt: skip
        with new_table(tmp_path / f"{name}.csv", rows):
            pass
    found = {one.contender: one.median_s for one in rows_of_parts(tmp_path, [part("a"), part("b"), part("never ran")])}
    assert found == {"fused": row().median_s, "eager": row().median_s, "compile": row().median_s}


def test_the_summary_says_what_came_out(tmp_path):
    outcomes = {"kernels": Outcome(FAILED, "exit status 1", 60.0, "abc", "2026-01-01")}
    (tmp_path / "kernels.xml").write_text(
        '<testsuites><testsuite tests="9" failures="2" errors="0" skipped="1"/></testsuites>'
    )
    rows = [
        row("eager", images_per_s=2500.0, median_s=0.1), row(median_s=0.05),
        row("fused-moments", status="refused by the gate", reason="output differs", median_s=None),
    ]  # fmt: skip
    text = compose(tmp_path, [part("kernels"), part("later")], outcomes, rows, CPU)
    assert "| kernels | for tests | failed exit status 1 (6 tests passed, 2 failed, 1 skipped) | 60 |" in text
    assert "| later | for tests | not run yet |  |" in text
    assert "Of 2 comparisons of fused contenders with fp64, 1 passed the gate." in text
    assert "fused-moments: refused by the gate: output differs" in text
    assert "| 7,162 | fused, fp16, batch 256 | 5,000 | 0.70 |" in text
    assert "Ahead in 1 of 1 comparisons." in text
    emulated = compose(tmp_path, [], {}, rows, device_named("vgpu:sm_90")) if not needs_vgpu.args[0] else ""
    assert "Ahead" not in emulated


@needs_vgpu
def test_a_part_of_the_dry_run(tmp_path):
    assert gpu.main(["--dry", "--out", str(tmp_path), "--parts", "ops"]) == 0
    rows = read_rows(tmp_path / "bench.csv")
    assert {(one.case, one.status) for one in rows if one.contender == "fused"} == {
        ("add_relu.stage1", "ok"), ("bn_statistics.stage1", "ok"),
    }  # fmt: skip
    assert {one.device for one in rows} == {"vgpu:sm_90, emulated"}
    for name in ("bench.html", "bench.png", "ops.html", "ops.png", "ops.log", "summary.md"):
        assert (tmp_path / name).stat().st_size > 100
    assert "their times mean nothing" in (tmp_path / "summary.md").read_text()


@needs_vgpu
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_whole_dry_run():
    done = subprocess.run(["make", "gpu", "DRY=1", "FRESH=1"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed after") == 7


def collections() -> set[tuple[str, ...]]:
    """What pytest is asked to choose, each once."""
    found = set()
    for parts in EVERY.values():
        for command in (command for one in parts for command in one.commands if "pytest" in command):
            tests = command[command.index("pytest") + 1 :]
            found.add(
                tuple(word for word in tests if not word.startswith(("--junitxml", "-n")) and not word.isdecimal())
            )
    return found


@pytest.mark.slow
def test_keywords_choose_tests():
    for tests in sorted(collections()):
        collect = [sys.executable, "-m", "pytest", *tests, "--collect-only"]
        done = subprocess.run(collect, cwd=ROOT, capture_output=True, check=False)
        assert done.returncode == 0, (tests, done.stdout[-300:])
