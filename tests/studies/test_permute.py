"""fusedres.studies.permute: what changes places, and how disorder is measured."""

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from fusedres.studies import permute
from fusedres.studies.dissect import blocks_of, dissected
from fusedres.studies.permute import PERMUTE
from fusedres.studies.study import Row, Table
from fusedres.studies.training import error_of
from tests.studies.tiny import done, drawn, images, network, table_of, untrained


def test_blocks_of_one_shape_change_places_and_come_back():
    model, pictures = dissected(network("cifar_resnet20")), images()
    own = [block.block for block in blocks_of(model)]
    before = error_of(model, pictures)
    rows = list(permute.shuffle_some(model, pictures, [1, 8], 6, torch.Generator().manual_seed(0)))
    assert [block.block for block in blocks_of(model)] == own
    assert error_of(model, pictures) == before
    assert all(-1 <= row.x <= 1 for row in rows)
    assert min(row.x for row in rows) < 0.9
    # One swap of neighbours disorders one of 36 pairs, of blocks two apart three.
    assert {round(36 * (1 - row.x) / 2) for row in rows[:6]} <= {1, 3}


@pytest.mark.parametrize(("order", "tau"), [([0, 1, 2, 3], 1), ([3, 2, 1, 0], -1), ([1, 0, 2, 3], 4 / 6)])
def test_kendall(order, tau):
    assert permute.kendall(order) == pytest.approx(tau)


def test_rank_correlation_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    a, b = [1.0, 5.0, 2.0, 2.0, 7.0], [2.0, 4.0, 4.0, 1.0, 9.0]
    assert permute.rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)


@pytest.mark.parametrize(
    ("errors", "verdict"),
    [(range(20), "agrees"), (range(20, 0, -1), "disagrees"), ([1, 2] * 10, "not decided")],
)
def test_a_verdict_asks_for_more_than_chance(errors, verdict):
    rows = [Row(permute.ERROR, 1 - i / 20, error) for i, error in enumerate(errors)]
    assert PERMUTE.found(Table({0: rows})).verdict == verdict


def test_orders_are_measured_and_drawn():
    lab = untrained(PERMUTE, {"ResNet-56": network("cifar_resnet20")}, draws=1)
    table = table_of(PERMUTE, lab)
    assert table.last(permute.ERROR).x == 1
    assert sum(point.samples for point in table.points) == 1 + len(permute.SWAPS)
    (axes,) = drawn(PERMUTE, table)
    assert axes.get_xlim()[0] > axes.get_xlim()[1]


@pytest.mark.slow
def test_disorder_costs_a_trained_network(tmp_path):
    assert done(PERMUTE, tmp_path, draws=5)[0].verdict == "agrees"
