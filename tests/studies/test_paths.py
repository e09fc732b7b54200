"""fusedres.studies.paths: lengths are binomial, and gradients of all paths are the gradient."""

import itertools
import math
from collections import Counter

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from fusedres.studies import paths
from fusedres.studies.dissect import DissectedBlock, blocks_of, dissected
from fusedres.studies.paths import PATHS
from fusedres.studies.study import Row, Table
from fusedres.studies.training import Images
from tests.studies.tiny import done, drawn, images, network, table_of, untrained


@pytest.fixture
def model():
    return dissected(network("cifar_resnet20"))


def test_gradients_of_all_paths_sum_to_the_gradient(model):
    """Over all subsets of blocks, paths add up to the whole; the study samples them."""
    model = model.double()
    for block in blocks_of(model)[3:]:
        block.part = "shortcut"  # leaves three blocks, eight paths
    pixels, labels = images()
    x = pixels.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy
    (whole,) = torch.autograd.grad(loss(model(x), labels), x)
    total = torch.zeros_like(whole)
    for choice in range(8):
        for i in range(3):
            chosen = "gradient by residual" if choice >> i & 1 else "gradient by shortcut"
            blocks_of(model)[i].part = chosen
        total += torch.autograd.grad(loss(model(x), labels), x)[0]
    torch.testing.assert_close(total, whole)


def test_lengths_of_paths_are_binomial_and_weigh_the_gradients(model):
    rows = list(paths.path_gradients(model, images(), 3, torch.Generator().manual_seed(0)))
    table = Table({0: rows})
    of = {name: [point.mean for point in table.of(name)] for name in (paths.NORM, paths.PATHS_SHARE, paths.CARRIED)}
    assert of[paths.PATHS_SHARE] == [math.comb(9, k) / 512 for k in range(10)]
    weights = [a * b for a, b in zip(of[paths.NORM], of[paths.PATHS_SHARE], strict=True)]
    assert of[paths.CARRIED] == pytest.approx([weight / sum(weights) for weight in weights])
    # All shortcuts, or all residuals: one path each.
    assert [table.at(paths.NORM, length).std for length in (0, 9)] == [0, 0]
    assert all(block.part == "whole" for block in blocks_of(model))
    assert paths.middle(dict(enumerate(of[paths.PATHS_SHARE]))) == (2, 7)


class Scaling(torch.nn.Module):
    """A block whose residual is ``scale`` times what it is given."""

    downsample = None

    def __init__(self, scale):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def shortcut(self, x):
        return x

    def residual(self, x):
        return self.scale * x

    def forward(self, x):
        return (self.residual(x) + self.shortcut(x)).relu()


def test_what_paths_of_linear_blocks_carry_is_binomial():
    """Over a path of k blocks the gradient is scale**k times that over none: of all gradient, C(n, k) scale**k /
    (1 + scale)**n goes over paths of length k."""
    n, scale = 7, 0.25
    blocks = [DissectedBlock(Scaling(scale)) for _ in range(n)]
    flat = torch.nn.Flatten()
    pixels, labels = images(side=4)
    pictures = Images(pixels.double().abs(), labels % 16)
    rows = paths.path_gradients(torch.nn.Sequential(*blocks, flat), pictures, 2, torch.Generator().manual_seed(0))
    table = Table({0: list(rows)})
    alone = table.at(paths.NORM, 0).mean
    for k in range(n + 1):
        assert table.at(paths.NORM, k).mean == pytest.approx(alone * scale**k)
        assert table.at(paths.PATHS_SHARE, k).mean == math.comb(n, k) / 2**n
        expected = math.comb(n, k) * scale**k / (1 + scale) ** n
        assert table.at(paths.CARRIED, k).mean == pytest.approx(expected, rel=1e-9)


def test_lengths_of_all_paths_through_a_network_are_counted_by_the_share(model):
    """Each block is taken or left out: of the 2**9 choices those of k blocks."""
    total = len(blocks_of(model))
    counted = Counter(sum(choice) for choice in itertools.product((0, 1), repeat=total))
    table = Table({0: list(paths.path_gradients(model, images(4), 1, torch.Generator().manual_seed(0)))})
    assert [table.at(paths.PATHS_SHARE, k).mean for k in range(total + 1)] == [
        counted[k] / 2**total for k in range(total + 1)
    ]


def shares(length):
    """All of the gradient at one length of nine."""
    rows = [Row(paths.PATHS_SHARE, k, math.comb(9, k) / 512) for k in range(10)]
    return Table({0: [*rows, *(Row(paths.CARRIED, k, float(k == length)) for k in range(10))]})


@pytest.mark.parametrize(("length", "verdict"), [(1, "agrees"), (2, "not decided"), (7, "disagrees")])
def test_a_verdict_asks_that_lengths_do_not_overlap(length, verdict):
    assert PATHS.found(shares(length)).verdict == verdict


def test_paths_are_measured_and_drawn():
    lab = untrained(PATHS, {"ResNet-56": network("cifar_resnet20")}, draws=1)
    table = table_of(PATHS, lab)
    assert {series: len(table.of(series)) for series in table.series} == {
        paths.NORM: 10, paths.PATHS_SHARE: 10, paths.CARRIED: 10,
    }  # fmt: skip
    assert sum(point.mean for point in table.of(paths.CARRIED)) == pytest.approx(1)
    assert len(drawn(PATHS, table)) == 3


@pytest.mark.slow
def test_short_paths_carry_the_gradient_of_a_trained_network(tmp_path):
    assert done(PATHS, tmp_path, draws=3)[0].verdict != "disagrees"
