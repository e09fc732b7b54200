"""fusedres.studies.preact: how fast deep networks learn."""

import math

import pytest
from torch import nn

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from fusedres.studies.preact import KINDS, PREACT
from fusedres.studies.run import run
from fusedres.studies.study import Lab, Setting
from fusedres.studies.training import Trained
from fusedres.train.logs import Epoch
from tests.studies.made_up import drawn, errors, of_the_paper, shown, table

LABELS = [f"{kind}, {depth}" for depth in (20, 110) for kind in KINDS]


def of(*values):
    curves = [f"{label}, loss" for label in LABELS] + errors(LABELS)
    return table(dict(zip(LABELS, values, strict=True)), curves)


@pytest.mark.parametrize(
    "verdict, rows",
    [
        ("agrees", of([1.0], [1.1], [1.5], [1.2])),
        ("disagrees", of([1.0, 1.0], [0.5, 0.5], [1.2, 1.2], [1.5, 1.5])),
        ("not decided", of([1.0], [0.5], [1.22], [1.2])),
        ("not decided", of([1.0, 1.0], [0.5, 0.5], [1.2, 1.8], [1.1, 1.3])),
    ],
    ids=["faster", "slower", "within the margin", "within the spread"],
)
def test_the_deepest_pair_decides(verdict, rows):
    assert PREACT.found(rows).verdict == verdict


def trained(*losses, diverged=False):
    history = [Epoch(i, i, 0.1, loss, 0.5, loss, 0.5, 0.1, 1.0, 1.0, 1.0) for i, loss in enumerate(losses, 1)]
    return Trained(nn.Identity(), history, diverged)


def test_the_first_half_is_averaged_and_who_diverged_guesses_from_there_on(tmp_path):
    networks = {"whole": trained(4.0, 2.0, 1.0, 0.0), "short": trained(1.0, diverged=True), "none": trained()}
    rows = list(PREACT.measure(Lab(Setting(), 0, networks, PREACT.recipe(Setting()), tmp_path)))
    early = {row.series: row.value for row in rows if row.x == 0}
    assert early == pytest.approx({"whole": 3.0, "short": (1.0 + math.log(10)) / 2, "none": math.log(10)})
    assert [row[1:] for row in rows if row.series == "whole, loss"] == [(1, 4.0), (2, 2.0), (3, 1.0), (4, 0.0)]


def test_the_picture_has_both_kinds_in_the_same_colour():
    losses, tests = drawn(PREACT, of([1.0], [1.1], [1.5], [1.2]))
    assert shown(losses) == shown(tests) == LABELS
    colours = [line.get_color() for line in losses.lines]
    assert colours[0] == colours[1] != colours[2] == colours[3]


def test_the_networks_of_the_paper_are_built_each_with_its_layers():
    models = of_the_paper(PREACT)
    assert list(models) == [f"{kind}, {depth}" for depth in (110, 164, 1001) for kind in KINDS]
    for label, model in models.items():
        depth = int(label.split()[-1])
        # Bottlenecks have projections where a stage begins, which do not count as layers.
        projections = 3 if depth > 110 else 0
        assert sum(isinstance(part, nn.Conv2d) for part in model.modules()) == depth - 1 + projections


@pytest.mark.slow
def test_110_layers_learn_from_the_first_epoch_with_pre_activation(tmp_path, plain_where_small):
    assert run(PREACT, tmp_path, Setting(epochs=1), [0], say=print).verdict == "agrees"
