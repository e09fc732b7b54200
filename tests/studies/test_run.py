"""fusedres.studies.run: seeds, folders, interruptions, and what is written where something is missing."""

import csv
import json
import signal
import sys
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from fusedres.commands import study as study_command
from fusedres.studies.catalogue import STUDIES, listed
from fusedres.studies.run import Record, run
from fusedres.studies.study import Finding, Row, Setting, Study
from fusedres.studies.training import Spec
from fusedres.train.checkpoint import load
from fusedres.train.stopping import Stopped, Stopping
from fusedres.train.trainer import CHECKPOINT
from fusedres_cli.main import main

SETTING = Setting(epochs=2, plain=True)
STEPS = 2 * 23
"""Of a network: 1,437 digits in batches of 64."""


def small(label, lr=0.1):
    def make(*, classes, channels, fused):
        return nn.Sequential(
            nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(32, classes),
        )  # fmt: skip

    return Spec(label, make, lambda recipe: replace(recipe, lr=lr))


def found(table):
    return Finding(f"{len(table.points)} points", "agrees")


def draw(figure, table):
    axes = figure.subplots()
    for series in table.series:
        axes.plot([point.x for point in table.of(series)], [point.mean for point in table.of(series)], ".")


def made_up(*specs, measure=lambda lab: lab.curves()):
    return Study(
        "degradation", "nobody, arXiv:0000.00000", "something", lambda setting: specs, measure, found, draw, epochs=2
    )


def count(lab):
    """Two draws at one place and one at another, which tell the seed."""
    return [Row("a", 1, lab.seed), Row("a", 1, lab.seed + 0.5), Row("a", 2, 10.0 * lab.seed)]


def points(folder):
    with (folder / "degradation.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def quiet(words):
    pass


def test_a_point_is_mean_deviation_and_least_over_seeds_and_draws(tmp_path):
    run(made_up(measure=count), tmp_path, SETTING, [3, 5], say=quiet)
    one, other = points(tmp_path)
    values = torch.tensor([3, 3.5, 5, 5.5], dtype=torch.float64)
    assert (one["series"], one["x"], one["best"], one["samples"]) == ("a", "1", "3", "4")
    assert (float(one["mean"]), float(one["std"])) == (4.25, float(values.std()))
    assert (other["x"], other["mean"], other["best"], other["samples"]) == ("2", "40.0", "30.0", "2")


def test_seeds_that_the_folder_holds_are_not_measured_again(tmp_path):
    measured = []
    study = made_up(measure=lambda lab: measured.append(lab.seed) or count(lab))
    for seeds, new in (([0, 1], [0, 1]), ([0, 1, 2], [2]), ([1], [])):
        measured.clear()
        said = []
        run(study, tmp_path, SETTING, seeds, say=said.append)
        assert measured == new
        assert {point["samples"] for point in points(tmp_path)} == {str(len(seeds)), str(2 * len(seeds))}
        assert said[-2].endswith(f"digits, {len(seeds)} seed{'s' * (len(seeds) > 1)}")
    run(study, tmp_path, SETTING, [1], say=quiet, fresh=True)
    assert measured == [1]
    assert list(json.loads((tmp_path / "degradation.json").read_text())["rows"]) == ["1"]


def stopped(study, folder, seeds, at):
    """A run that is asked to stop after so many steps of all its trainings."""
    wish = Stopping()

    def tell(words, done, of):
        if done >= at:
            wish.requested = signal.SIGINT

    with pytest.raises(Stopped):
        run(study, folder, SETTING, seeds, say=quiet, wish=wish, tell=tell)


def weights(folder):
    return {path.parent.name: load(path)["model"] for path in sorted(folder.glob(f"networks/*/{CHECKPOINT}"))}


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path):
    """Stopped within both epochs of the first seed and, with the rows of that one kept, within the second."""
    study = made_up(small("network"))
    run(study, tmp_path / "whole", SETTING, [0, 1], say=quiet)
    parts = tmp_path / "parts"
    for at in (10, 30):
        stopped(study, parts, [0, 1], at)
        held = json.loads((parts / "degradation.json").read_text())
        assert held["rows"] == {} and "finding" not in held
        assert not (parts / "degradation.csv").exists()
    stopped(study, parts, [0, 1], STEPS + 10)
    assert list(json.loads((parts / "degradation.json").read_text())["rows"]) == ["0"]
    run(study, parts, SETTING, [0, 1], say=quiet)
    assert (parts / "degradation.csv").read_bytes() == (tmp_path / "whole" / "degradation.csv").read_bytes()
    whole, resumed = weights(tmp_path / "whole"), weights(parts)
    assert list(whole) == list(resumed) and len(whole) == 2
    for name, model in whole.items():
        assert all(torch.equal(tensor, resumed[name][key]) for key, tensor in model.items())


def test_a_network_is_trained_once_for_all_studies_of_a_folder_and_draws_of_it_differ(tmp_path):
    one = small("one")
    run(made_up(one), tmp_path, Setting(epochs=1, plain=True), [0], say=quiet)
    told = []
    other = made_up(one, one._replace(label="again", draw=1))._replace(name="lesion")
    run(other, tmp_path, Setting(epochs=1, plain=True), [0], say=quiet, tell=lambda words, *_: told.append(words))
    assert told and all("again" in words for words in told)
    first, second = weights(tmp_path).values()
    assert not torch.equal(first["0.weight"], second["0.weight"])


def test_a_network_that_diverges_is_told_of_and_the_study_goes_on(tmp_path):
    """The rows are those of the epochs that went well, here none; the network is the last that was sound."""
    models = {}

    def measure(lab):
        models.update({label: trained.model for label, trained in lab.networks.items()})
        return lab.curves()

    said = []
    study = made_up(small("wild", lr=1e30), small("tame"), measure=measure)
    run(study, tmp_path, Setting(epochs=1, plain=True), [0], say=said.append)
    assert said[0] == "wild, seed 0: diverged after 0 epochs"
    assert [point["series"] for point in points(tmp_path)] == ["tame, training", "tame, test"]
    assert all(tensor.isfinite().all() for tensor in models["wild"].state_dict().values())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"epochs": 3}, "epochs: was 2, now 3"),
        ({"draws": 4}, "draws: was 10, now 4"),
        ({"plain": False, "amp": "bf16"}, "amp: was None, now 'bf16'; plain: was True, now False"),
        ({"full": True}, "data: was 'digits', now 'cifar10'; full: was False, now True"),
    ],
)
def test_results_of_another_setting_are_refused_with_what_differs(tmp_path, changes, named):
    study = made_up(measure=count)
    run(study, tmp_path, SETTING, [0], say=quiet)
    before = (tmp_path / "degradation.json").read_bytes()
    other = replace(SETTING, **changes)
    with pytest.raises(ValueError, match=r"degradation\.json is of another setting: ") as raised:
        run(study, tmp_path, other, [0], say=quiet)
    assert f": {named};" in str(raised.value)
    assert (tmp_path / "degradation.json").read_bytes() == before
    run(study, tmp_path, other, [0], say=quiet, fresh=True)
    assert Record(tmp_path, study, other).rows == {0: count(Seed(0))}


class Seed(NamedTuple):
    seed: int


@pytest.mark.parametrize(
    "text", ["{", "", "[]", "3", "{}", '{"rows": []}', '{"rows": {"a": []}, "setting": {}}', '{"rows": {"0": [["a"]]}}']
)
def test_a_file_that_is_no_result_is_refused_and_kept_until_asked(tmp_path, text):
    path = tmp_path / "degradation.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"degradation\.json is no result of a study"):
        run(made_up(measure=count), tmp_path, SETTING, [0], say=quiet)
    assert path.read_text() == text
    run(made_up(measure=count), tmp_path, SETTING, [0], say=quiet, fresh=True)
    assert json.loads(path.read_text())["finding"]["verdict"] == "agrees"


def test_a_folder_that_can_not_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out: the folder .*file can not be made"):
        run(made_up(measure=count), tmp_path / "file", SETTING, [0], say=quiet)


def test_without_matplotlib_the_table_is_written_and_no_picture_is_left_from_before(tmp_path, monkeypatch):
    study = made_up(measure=count)
    picture = tmp_path / "degradation.png"
    picture.write_bytes(b"of another day")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = []
    run(study, tmp_path, SETTING, [0], say=said.append)
    assert said[0] == "no picture: matplotlib is not installed (pip install fusedres[cli])"
    assert len(points(tmp_path)) == 2
    assert not picture.exists()


def test_with_matplotlib_the_picture_is_drawn_of_what_the_folder_holds(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    study = made_up(measure=count)
    run(study, tmp_path, SETTING, [0], say=quiet)
    monkeypatch.undo()
    said = []
    run(study._replace(measure=None), tmp_path, SETTING, [0], say=said.append)
    assert [line.split(":")[0] for line in said] == ["paper", "here", "verdict"]
    assert (tmp_path / "degradation.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_command_lists_all_studies(capsys):
    assert main(["study", "--list"]) == 0
    assert capsys.readouterr().out == f"{listed()}\n"


@pytest.mark.parametrize(
    ("names", "message"),
    [(["nonsense"], "got 'nonsense'"), (["identity", "ensembles"], "got 'ensembles'"), ([], "or all\n")],
)
def test_the_command_lists_all_studies_where_a_name_is_none_of_them(tmp_path, names, message, capsys):
    assert main(["study", *names, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.splitlines()[-len(STUDIES) :] == listed().splitlines()
    assert not (tmp_path / "out").exists()


def command(tmp_path, *more):
    return main(["study", "degradation", "--epochs", "2", "--plain", "--device", "cpu", "--out", str(tmp_path), *more])


@pytest.fixture
def counted(monkeypatch):
    """`count` in place of a study that takes minutes."""
    monkeypatch.setattr(study_command, "found", lambda name: made_up(measure=count)._replace(name=name))


def test_the_command_writes_table_picture_and_page_and_goes_on_from_them(tmp_path, capsys, counted):
    pytest.importorskip("matplotlib")
    assert command(tmp_path, "--seeds", "2", "--seed", "5") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "degradation"
    assert printed[1:4] == [
        "paper: something (nobody, arXiv:0000.00000)", "here:  2 points, digits, 2 seeds", "verdict: agrees",
    ]  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {
        "degradation.csv", "degradation.json", "degradation.png", "networks", "studies.html",
    }  # fmt: skip
    assert [point["best"] for point in points(tmp_path)] == ["5", "50.0"]


def test_the_command_refuses_before_any_study_runs(tmp_path, capsys, counted):
    """Of two studies the second is the one whose results are of another setting."""
    assert command(tmp_path) == 0
    capsys.readouterr()
    assert main(["study", "lesion", "degradation", "--draws", "3", "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert (
        "degradation.json is of another setting: draws: was 10, now 3; epochs: was 2, now None; plain: was True"
        in printed.err
    )
    assert printed.out == "" and not (tmp_path / "lesion.json").exists()
