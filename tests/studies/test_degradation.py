"""fusedres.studies.degradation: depth against training error."""

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from fusedres.studies.degradation import DEGRADATION
from fusedres.studies.run import run
from fusedres.studies.study import Row, Setting, Table
from tests.studies.made_up import drawn, errors, of_the_paper, shown

LABELS = ["plain-20", "plain-56", "ResNet-20", "ResNet-56"]


def of(*values):
    """Of the training errors of each seed after the second epoch; the test errors are the same."""
    rows = {seed: [] for seed in range(len(values[0]))}
    for label, ends in zip(LABELS, values, strict=True):
        for seed, end in enumerate(ends):
            rows[seed] += [Row(name, epoch, error) for name in errors([label]) for epoch, error in ((1, 0.9), (2, end))]
    return Table(rows)


@pytest.mark.parametrize(
    "verdict, rows",
    [
        ("agrees", of([0.04], [0.74], [0.02], [0.01])),
        ("agrees", of([0.04, 0.05], [0.74, 0.76], [0.010, 0.012], [0.011, 0.013])),
        ("disagrees", of([0.74], [0.04], [0.02], [0.01])),
        ("disagrees", of([0.04], [0.74], [0.01], [0.03])),
        ("not decided", of([0.045], [0.05], [0.02], [0.01])),
        ("not decided", of([0.04, 0.05], [0.74, 0.76], [0.01, 0.01], [0.01, 0.30])),
    ],
    ids=["both", "residual alike", "plain lower", "residual higher", "plain alike", "residual higher for one seed"],
)
def test_plain_is_higher_and_residual_is_not(verdict, rows):
    assert DEGRADATION.found(rows).verdict == verdict


def test_the_ends_are_told():
    words = DEGRADATION.found(of([0.04], [0.74], [0.02], [0.01])).words
    ends = "4.0% for plain-20; 74.0% for plain-56; 2.0% for ResNet-20; 1.0% for ResNet-56"
    assert words == f"training error at the end: {ends}"


def test_the_picture_has_a_panel_for_each_kind():
    panels = drawn(DEGRADATION, of([0.04], [0.74], [0.02], [0.01]))
    assert [shown(axes) for axes in panels] == [errors(LABELS[:2]), errors(LABELS[2:])]


def test_the_networks_of_the_paper_are_built():
    depths = (20, 32, 44, 56)
    plain = [f"plain-{depth}" for depth in depths]
    assert list(of_the_paper(DEGRADATION)) == [*plain, *(f"ResNet-{depth}" for depth in (*depths, 110))]


@pytest.mark.slow
def test_56_plain_layers_do_not_learn_in_epochs_in_which_20_do_and_56_residual_ones_do(tmp_path, plain_where_small):
    run(DEGRADATION, tmp_path, Setting(epochs=10), [0], say=print)
    lines = (tmp_path / "degradation.csv").read_text().splitlines()
    errors = {line.split('"')[1]: float(line.split(",")[-4]) for line in lines if ", training" in line}
    assert errors["plain-56, training"] > errors["plain-20, training"] + 0.3
    assert errors["ResNet-56, training"] < errors["plain-56, training"] - 0.3
