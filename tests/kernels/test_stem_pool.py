"""fusedres.kernels.stem_pool, compiled and executed: normalise, rectify, pool, and the way back."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from fusedres.bench.eager import normalised
from fusedres.operands import Norm, NormNumbers, OutputGrad, PoolGeometry
from fusedres.ops.bn_finalize import bn_from_running
from fusedres.ops.stem_pool import NO_GRADIENT, stem_pool, stem_pool_backward
from fusedres.plan.tiles import pinned, row_tiles
from tests.comparison import assert_as_accurate_as_eager
from tests.kernels.executed import TESTED, Size, activation, covering, executed

RESNET = PoolGeometry()


class Case(NamedTuple):
    """The raw output's size and the window that goes over it."""

    size: Size
    pool: PoolGeometry = RESNET


CASES = {
    "the stem of ResNet, scaled down": Case((2, 64, 28, 28)),
    "odd sides": Case((1, 64, 15, 9)),
    "even and odd side": Case((2, 16, 8, 7)),
    "one pixel": Case((1, 64, 1, 1)),
    "two pixels": Case((1, 8, 1, 2)),
    "windows side by side": Case((1, 32, 6, 8), PoolGeometry((2, 2), (2, 2), (0, 0))),
    "the last row in no window": Case((1, 32, 9, 6), PoolGeometry((2, 2), (2, 2), (0, 0))),
    "gaps between windows": Case((1, 16, 11, 11), PoolGeometry((2, 2), (3, 3), (1, 1))),
    "every pixel in nine windows": Case((1, 16, 6, 6), PoolGeometry((3, 3), (1, 1), (1, 1))),
    "a window wider than high": Case((1, 16, 7, 9), PoolGeometry((1, 4), (1, 2), (0, 2))),
    "the largest index": Case((1, 8, 17, 16), PoolGeometry((17, 15), (17, 15), (0, 0))),
    "a row is several pieces": Case((1, 256, 5, 5)),
    "8 divides C": Case((1, 40, 9, 9)),
    "4 divides C": Case((2, 12, 9, 9)),
    "odd C": Case((1, 33, 6, 6)),
    "one channel": Case((1, 1, 12, 12)),
}


def eager(y: Tensor, scale: Tensor, shift: Tensor, pool: PoolGeometry) -> tuple[Tensor, Tensor]:
    u = torch.relu(normalised(y, scale, shift))
    z, position = max_pool2d(u, *pool, return_indices=True)
    return z, position


def gathered(index: Tensor, u: Tensor, pool: PoolGeometry) -> Tensor:
    """The value at each window's tap; 0 where the index says that there is no gradient."""
    n, c, p, q = index.shape
    rows = torch.arange(p).view(p, 1) * pool.stride[0] - pool.padding[0] + index.long() // pool.kernel[1]
    columns = torch.arange(q) * pool.stride[1] - pool.padding[1] + index.long() % pool.kernel[1]
    nowhere = index == NO_GRADIENT
    inside = (rows >= 0) & (rows < u.shape[2]) & (columns >= 0) & (columns < u.shape[3])
    assert (inside | nowhere).all()
    position = torch.where(nowhere, 0, rows * u.shape[3] + columns)
    return torch.where(nowhere, 0, u.flatten(2).gather(2, position.flatten(2)).view(n, c, p, q))


@pytest.mark.parametrize(("case", "target", "dtype"), covering(CASES))
def test_forward(case: str, target: str, dtype: torch.dtype) -> None:
    size, pool = CASES[case]
    y, (scale, shift) = activation(size, dtype), torch.randn(2, size[1])
    (z, index), trace = executed(target, lambda: stem_pool(y, scale, shift, pool))
    assert trace.by_kernel() == {"stem_pool_kernel": 1}
    exact, _ = eager(y.double(), scale.double(), shift.double(), pool)
    assert_as_accurate_as_eager(z, eager(y, scale, shift, pool)[0], exact)
    # Not equality with the formula's indices: the compiler fuses a multiplication and an addition, and breaks ties.
    u = torch.relu(y.double() * scale.double().view(1, -1, 1, 1) + shift.double().view(1, -1, 1, 1))
    assert ((gathered(index, u, pool) - z).abs() <= torch.finfo(dtype).eps * (1 + z.abs())).all()
    assert torch.equal(index == NO_GRADIENT, z == 0)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("case", "target", "dtype"), covering(["the stem of ResNet, scaled down", "odd C"]))
def test_running_statistics(case: str, target: str, dtype: torch.dtype, biased: bool) -> None:
    size, pool = CASES[case]
    y = activation(size, dtype)
    mean, gamma, beta, bias = torch.randn(4, size[1]).to(dtype)
    var = (torch.rand(size[1]) + 0.5).to(dtype)
    norm = Norm(gamma, beta, mean, var, bias if biased else None, numbers=NormNumbers(1e-3))
    (z, _), trace = executed(target, lambda: stem_pool(y, None, None, pool, indices=False, running=norm))
    assert trace.by_kernel() == {"stem_pool_kernel": 1}
    numbers = bn_from_running.reference(norm, torch.float64)
    exact, _ = eager(y.double(), numbers.scale, numbers.shift, pool)
    assert_as_accurate_as_eager(z, eager(y, numbers.scale.float(), numbers.shift.float(), pool)[0], exact)


@pytest.mark.parametrize(("case", "target", "dtype"), covering(CASES, offset=1))
def test_backward(case: str, target: str, dtype: torch.dtype) -> None:
    size, pool = CASES[case]
    y, (scale, shift) = activation(size, dtype), torch.randn(2, size[1])
    z, index = stem_pool.reference(y, scale, shift, pool)
    _, position = stem_pool.reference(y, scale, shift, pool, compact=False)
    dz = activation(tuple(z.shape), dtype)
    g, trace = executed(target, lambda: stem_pool_backward(OutputGrad(dz), index, size, pool))
    assert trace.by_kernel() == {"stem_pool_backward_kernel": 1}

    def library(dtype: torch.dtype) -> Tensor:
        arriving = torch.where(z > 0, dz, 0.0).to(dtype)
        like = torch.empty(size, dtype=dtype, memory_format=torch.channels_last)
        return torch.ops.aten.max_pool2d_with_indices_backward(arriving, like, *pool, (1, 1), False, position)

    assert_as_accurate_as_eager(g, library(dtype), library(torch.float64))


@pytest.mark.parametrize(("case", "target", "dtype"), covering(["the stem of ResNet, scaled down", "odd C"]))
def test_every_tile(case: str, target: str, dtype: torch.dtype) -> None:
    size, pool = CASES[case]
    y, (scale, shift) = activation(size, dtype), torch.randn(2, size[1])
    expected_z, index = stem_pool.reference(y, scale, shift, pool)
    exact_z, _ = eager(y.double(), scale.double(), shift.double(), pool)
    dz = activation(tuple(expected_z.shape), dtype)
    expected_g = stem_pool_backward.reference(OutputGrad(dz.double()), index, size, pool)
    for tile in row_tiles(expected_z[:, 0].numel(), size[1], dtype.itemsize, vectors=2):
        with pinned(tile):
            (z, _), _ = executed(target, lambda: stem_pool(y, scale, shift, pool))
            g, _ = executed(target, lambda: stem_pool_backward(OutputGrad(dz), index, size, pool))
        assert_as_accurate_as_eager(z, expected_z, exact_z)
        assert_as_accurate_as_eager(g, expected_g.to(dtype), expected_g)


@pytest.mark.parametrize("target", TESTED)
def test_ties_go_to_the_first_and_nan_to_the_last(target: str) -> None:
    """As the library's max-pooling has it."""
    y = torch.ones(1, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    y[0, 1] = -1.0
    y[0, 2, 0, 0] = y[0, 2, 1, 1] = float("nan")
    y[0, 3, 2, 2] = float("inf")
    numbers = torch.ones(8), torch.zeros(8)
    (z, index), _ = executed(target, lambda: stem_pool(y, *numbers, RESNET))
    expected_z, expected_index = stem_pool.reference(y, *numbers, RESNET)
    assert torch.equal(z.nan_to_num(7.0, posinf=9.0), expected_z.nan_to_num(7.0, posinf=9.0))
    assert torch.equal(index, expected_index)
    assert (index[0, 1] == NO_GRADIENT).all()
