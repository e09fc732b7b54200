"""fusedres.commands.calibrate: from a table of timed launches to constants that predictions go by."""

from dataclasses import replace

import pytest

from fusedres.bench.launches import Writer, read_launches
from fusedres.plan import constants, gpus
from fusedres.plan.gpus import GPUS, gpu_named
from fusedres_cli.main import main
from tests.timed_launches import OTHER, rows, timed


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    monkeypatch.setattr(constants, "folder", lambda: kept)
    monkeypatch.chdir(tmp_path)
    gpus.forget_measured()
    yield kept
    gpus.forget_measured()


def table(path, every):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = Writer(path, every)
    writer.close()
    return str(path)


def test_rows_are_written_and_read(tmp_path):
    every = [*timed(), replace(rows()[0], reason="RuntimeError: a, b\nc")]
    table(tmp_path / "a.csv", every)
    assert read_launches(tmp_path / "a.csv") == every


def test_a_folder_of_results_is_fitted_and_predictions_go_by_it(tmp_path, capsys, folder):
    table(tmp_path / "results" / "launches.csv", timed())
    assert gpu_named("h100") is GPUS["h100"]
    assert main(["calibrate", str(tmp_path / "results")]) == 0
    said = capsys.readouterr().out
    kept = constants.read(folder / "h100-132.json")
    assert kept.values.keys() == OTHER.keys() and kept.made_with["cudnn"] == "9"
    assert gpu_named("h100").measured == kept.values and not gpu_named("h200").measured
    for words in ("left alone: 0 launches depend on it", "convolution", "all  ", str(folder / "h100-132.json")):
        assert words in said
    for name, value in kept.values.items():
        assert value == pytest.approx(OTHER[name], rel=0.1)
    assert main(["calibrate", "--show"]) == 0
    shown = capsys.readouterr().out
    assert f"h100: {kept.launches} launches, {kept.date}" in shown and f"{kept.values['rows']:.4g}" in shown
    assert main(["calibrate", "--reset", "--gpu", "h100"]) == 0
    assert gpu_named("h100") is GPUS["h100"] and list(folder.iterdir()) == []
    capsys.readouterr()
    assert main(["calibrate", "--show"]) == 0 and main(["calibrate", "--reset", "--gpu", "h100"]) == 0
    assert capsys.readouterr().out.count("predictions go by the model's own constants") == 2


def test_without_a_file_the_one_table_of_results_is_taken_and_out_is_kept_elsewhere(tmp_path, capsys, folder):
    assert main(["calibrate"]) == 2
    assert "file: expected a table of timed launches, such as make gpu leaves; here: none in" in capsys.readouterr().err
    table(tmp_path / "bench" / "results" / "nvidia-h100" / "launches.csv", timed())
    assert main(["calibrate", "--out", "constants.json"]) == 0
    assert constants.read(tmp_path / "constants.json").gpu == "h100"
    assert not folder.exists() and gpu_named("h100") is GPUS["h100"]
    table(tmp_path / "bench" / "results" / "other" / "launches.csv", timed())
    assert main(["calibrate"]) == 2


def test_times_that_are_none_are_left_out_and_counted(tmp_path, capsys):
    every = list({row.key: row for row in timed()}.values())
    every[0] = replace(every[0], measured_s=float("nan"))
    every[1] = replace(every[1], measured_s=0.0)
    every[2] = replace(every[2], measured_s=-1.0)
    every[3] = replace(every[3], measured_s=None, reason="failed")
    guessed = sum(not row.known for row in every[4:])
    assert main(["calibrate", table(tmp_path / "a.csv", every)]) == 0
    said = capsys.readouterr().out
    assert "left out: 3 whose time is no number above 0\n" in said and "left out: 1 without a time\n" in said
    assert f"left out: {guessed} of which only a binary like theirs is known\n" in said
    assert f"h100: {len(every) - 4 - guessed} launches\n" in said


def other(**changes):
    return lambda every: [replace(row, **changes) for row in every]


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda every: every[:12], [], "launches: expected at least 20 that were timed, got 1"),
        (lambda every: [], [], "file: expected launches of one GPU, got of none"),
        (lambda every: every, ["--gpu", "h200"], "gpu: expected h100 with 132 multiprocessors"),
        (other(multiprocessors=114), [], "gpu: expected h100 with 114 multiprocessors"),
        (lambda every: [replace(every[0], gpu="a100"), *every[1:]], [], "got a100, h100 in"),
        (other(device="vgpu:sm_90, emulated"), [], "which mean nothing"),
        (other(work="{}"), [], "work: expected what a launch asks of a GPU"),
        (lambda every: every, ["--gpu", "h1000"], "gpu: expected a name such as"),
        (lambda every: every, ["--out", "a.txt"], "out must name a .json file"),
        (lambda every: every, ["--show"], "show, reset: expected alone"),
    ],
)
def test_what_can_not_be_fitted_is_refused_and_nothing_is_written(change, arguments, message, tmp_path, capsys, folder):
    path = table(tmp_path / "a.csv", change(timed()))
    assert main(["calibrate", path, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", None])
def test_a_file_that_is_no_table_is_refused(text, tmp_path, capsys):
    path = tmp_path / "a.csv"
    if text is not None:
        path.write_text(text)
    assert main(["calibrate", str(path)]) == 2
    assert "a.csv: expected a table of launches" in capsys.readouterr().err
    assert main(["calibrate", "--reset"]) == 2


def test_times_that_tell_of_no_constant_leave_no_file(tmp_path, capsys, folder):
    """As all of one launch, whose constants can not be told apart, each time another."""
    one = next(row for row in timed() if row.bound_by == "latency" and row.known)
    wild = [replace(one, key=f"{one.key} {i}", measured_s=one.measured_s * 4.0 ** (i % 7 - 3)) for i in range(21)]
    assert main(["calibrate", table(tmp_path / "a.csv", wild)]) == 1
    assert "these times determine none of the constants: nothing is written" in capsys.readouterr().out
    assert not folder.exists()
