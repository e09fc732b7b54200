"""fusedres.studies.plateau: when the learning rate falls."""

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from fusedres.models.cifar import cifar_resnet
from fusedres.studies.compared import built
from fusedres.studies.plateau import LABELS, PLATEAU
from fusedres.studies.run import run
from fusedres.studies.study import Row, Setting
from fusedres.train.recipe import Drops, Plateau
from tests.studies.made_up import drawn, errors, of_the_paper, shown, table

RATES = [f"{label}, rate" for label in LABELS]


def of(drops, plateau):
    return table(dict(zip(LABELS, (drops, plateau), strict=True)), RATES + errors(LABELS))


@pytest.mark.parametrize(
    "verdict, rows",
    [
        ("agrees", of([0.060, 0.061], [0.062, 0.061])),
        ("disagrees", of([0.06, 0.06], [0.10, 0.11])),
        ("disagrees", of([0.12], [0.06])),
        ("not decided", of([0.06], [0.06])),
        ("not decided", of([0.05, 0.08], [0.05, 0.08])),
    ],
    ids=["alike", "plateaus are worse", "drops are worse", "one seed", "within the spread"],
)
def test_errors_alike_agree(verdict, rows):
    assert PLATEAU.found(rows).verdict == verdict


def test_the_rates_of_every_seed_are_told():
    rows = of([0.06, 0.06], [0.06, 0.06])
    rows.rows[1][-1:] = [Row("plateau, rate", 4, 0.01)]
    assert PLATEAU.found(rows).words.endswith("the plateaus bring the rate from 0.8 to 0.01 or 0.27")


@pytest.mark.parametrize("full", [False, True])
def test_the_networks_differ_in_the_schedule_alone(full):
    setting = Setting(full=full)
    recipe = PLATEAU.recipe(setting)
    schedules = [spec.change(recipe).schedule for spec in PLATEAU.networks(setting)]
    assert schedules == [Drops((recipe.length / 2, 3 * recipe.length / 4)), Plateau()]


def test_the_picture_has_errors_and_rates():
    courses, rates = drawn(PLATEAU, of([0.060, 0.061], [0.062, 0.061]))
    assert (shown(courses), shown(rates)) == (errors(LABELS), list(LABELS))
    assert rates.get_yscale() == "log"


def test_the_networks_of_the_paper_are_built():
    assert list(of_the_paper(PLATEAU)) == list(LABELS)


@pytest.mark.slow
def test_the_rate_falls_at_the_drops(tmp_path, plain_where_small):
    said = []
    run(PLATEAU, tmp_path, Setting(epochs=4), [0], say=said.append)
    rows = (tmp_path / "plateau.csv").read_text().splitlines()
    rates = [float(row.split(",")[-4]) for row in rows if row.startswith('"drops, rate"')]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001])


@pytest.mark.slow
def test_eight_layers_learn_alike_with_both(tmp_path, plain_where_small):
    specs = [spec._replace(make=built("", cifar_resnet, 8).make) for spec in PLATEAU.networks(Setting())]
    study = PLATEAU._replace(networks=lambda setting: specs)
    assert run(study, tmp_path, Setting(), [0, 1], say=print).verdict == "agrees"
