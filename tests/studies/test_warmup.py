"""fusedres.studies.warmup: a lower learning rate at first."""

import pytest
from torch import nn

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from fusedres.studies.study import Lab, Setting
from fusedres.studies.training import Trained
from fusedres.studies.warmup import LABELS, WARMUP
from fusedres.train.logs import Epoch
from fusedres.train.recipe import Drops, WarmUp
from tests.studies.made_up import drawn, errors, of_the_paper, shown, table


def of(started, ends):
    epochs = {f"{label}, epochs": values for label, values in zip(LABELS, started, strict=True)}
    return table({**dict(zip(LABELS, ends, strict=True)), **epochs}, errors(LABELS))


@pytest.mark.parametrize(
    "verdict, rows",
    [
        ("agrees", of(([2, 2], [6, 7]), ([0.060, 0.061], [0.061, 0.062]))),
        ("disagrees", of(([6, 7], [2, 2]), ([0.06, 0.06], [0.06, 0.06]))),
        ("disagrees", of(([2, 2], [6, 7]), ([0.06, 0.06], [0.20, 0.20]))),
        ("not decided", of(([2], [3]), ([0.06], [0.06]))),
        ("not decided", of(([2, 2], [3, 9]), ([0.06, 0.06], [0.06, 0.06]))),
        ("not decided", of(([2, 2], [6, 7]), ([0.05, 0.07], [0.05, 0.07]))),
        ("not decided", of(([2], [6]), ([0.06], [0.065]))),
    ],
    ids=["later", "sooner", "another accuracy", "an epoch", "spread of epochs", "spread of errors", "one seed"],
)
def test_it_starts_later_and_ends_alike(verdict, rows):
    assert WARMUP.found(rows).verdict == verdict


def trained(*errors):
    history = [Epoch(i, i, 0.1, 1.0, error, 1.0, 0.3, 0.1, 1.0, 1.0, 1.0) for i, error in enumerate(errors, 1)]
    return Trained(nn.Identity(), history)


def test_the_epochs_until_it_starts_are_counted(tmp_path):
    networks = {"a": trained(0.9, 0.79, 0.85), "b": trained(0.9, 0.8, 0.85)}
    rows = list(WARMUP.measure(Lab(Setting(), 0, networks, WARMUP.recipe(Setting()), tmp_path)))
    assert {row.series: row.value for row in rows if row.x == 0} == {"a": 0.3, "b": 0.3, "a, epochs": 2, "b, epochs": 4}


@pytest.mark.parametrize("full", [False, True])
def test_the_networks_differ_in_the_warm_up_alone(full):
    setting = Setting(full=full)
    recipe = WARMUP.recipe(setting)
    with_, without = (spec.change(recipe) for spec in WARMUP.networks(setting))
    assert with_.schedule == without.schedule == Drops((recipe.length / 2, 3 * recipe.length / 4))
    assert (with_.warm_up, without.warm_up) == (WarmUp(0.01, until_error=0.8), None)


def test_the_picture_has_both_in_both_panels():
    rows = of(([2, 2], [6, 7]), ([0.060, 0.061], [0.061, 0.062]))
    assert [shown(axes) for axes in drawn(WARMUP, rows)] == [list(LABELS)] * 2


def test_the_networks_of_the_paper_are_built():
    models = of_the_paper(WARMUP)
    assert {label: len(model.layer1) for label, model in models.items()} == dict.fromkeys(LABELS, 18)
