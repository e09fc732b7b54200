"""fusedres.ops.stem_pool: maxima, where they stood, and the gradient they pass on."""

import pytest
import torch
from torch.nn.functional import max_pool2d

from fusedres.bench.eager import normalised
from fusedres.operands import OutputGrad, PoolGeometry
from fusedres.ops.stem_pool import NO_GRADIENT, stem_pool, stem_pool_backward
from tests.comparison import LOW, STORAGE, assert_as_accurate_as_eager, assert_close

POOLS = {
    "ResNet's": PoolGeometry((3, 3), (2, 2), (1, 1)),
    "no overlap": PoolGeometry((2, 2), (2, 2), (0, 0)),
    "gaps": PoolGeometry((2, 2), (3, 3), (0, 0)),
    "every pixel in nine windows": PoolGeometry((3, 3), (1, 1), (1, 1)),
    "nothing square": PoolGeometry((3, 2), (1, 2), (1, 0)),
    "large": PoolGeometry((5, 5), (3, 3), (2, 2)),
}
SIZES = {"even": (2, 5, 8, 8), "odd": (2, 3, 7, 9), "small": (1, 4, 5, 5), "C not a multiple of 8": (1, 13, 6, 6)}


def operands(size, dtype, values="random"):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    y = torch.randn(size, dtype=wide)
    scale, shift = torch.randn(size[1], dtype=wide), torch.randn(size[1], dtype=wide) * 0.3
    if values == "ties":
        y, scale, shift = (y * 1.5).round(), torch.ones_like(scale), torch.zeros_like(shift)
    elif values == "all negative":
        y, scale, shift = -y.abs(), scale.abs(), -shift.abs() - 0.1
    elif values == "constant":
        y, shift = torch.full_like(y, 0.5), shift.abs()
        scale = scale.abs()
    return y.to(dtype), scale, shift


def rectified(y, scale, shift):
    return (y * scale[:, None, None] + shift[:, None, None]).clamp(min=0)


def naive_index(u, pool):
    """The first maximum in window order, by loops."""
    n, c, h, w = u.shape
    p, q = pool.output_size(h, w)
    index = torch.full((n, c, p, q), NO_GRADIENT, dtype=torch.uint8)
    best = torch.zeros(n, c, p, q, dtype=u.dtype)
    for i in range(p):
        for j in range(q):
            for tap in range(pool.kernel[0] * pool.kernel[1]):
                row = i * pool.stride[0] - pool.padding[0] + tap // pool.kernel[1]
                column = j * pool.stride[1] - pool.padding[1] + tap % pool.kernel[1]
                if 0 <= row < h and 0 <= column < w:
                    above = u[:, :, row, column] > best[:, :, i, j]
                    best[:, :, i, j] = torch.where(above, u[:, :, row, column], best[:, :, i, j])
                    index[:, :, i, j] = torch.where(above, tap, index[:, :, i, j])
    return best, index


VALUES = ("random", "ties", "all negative", "constant")


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pool", POOLS)
def test_maximum_and_the_first_tap_it_stood_at(pool, size, values, each_backend):
    y, scale, shift = operands(SIZES[size], torch.float64, values)
    z, index = stem_pool(y, scale, shift, POOLS[pool])
    best, first = naive_index(rectified(y, scale, shift), POOLS[pool])
    assert_close(z, best, 1e-14)
    assert index.dtype == torch.uint8
    assert torch.equal(index, first)
    if values == "all negative":
        assert (index == NO_GRADIENT).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pool", POOLS)
def test_backward_is_autograd_of_max_pooling(pool, size, values, layout, each_backend):
    y, scale, shift = operands(SIZES[size], torch.float64, values)
    y = y.contiguous(memory_format=layout)
    normalised = (y * scale[:, None, None] + shift[:, None, None]).detach().requires_grad_()
    z = max_pool2d(normalised.relu(), *POOLS[pool])
    dz = torch.randn_like(z)
    (exact,) = torch.autograd.grad(z, normalised, dz)
    dz = dz.contiguous(memory_format=layout)
    copy = dz.clone()
    for compact in (True, False):
        out, index = stem_pool(y, scale, shift, POOLS[pool], compact=compact)
        assert index.dtype == (torch.uint8 if compact else torch.int64)
        g = stem_pool_backward(OutputGrad(dz, None if compact else out), index, tuple(y.shape), POOLS[pool])
        assert_close(g, exact, 1e-14)
        assert torch.equal(dz, copy), "dz was written to"


@pytest.mark.parametrize("dtype", STORAGE)
def test_rounds_no_more_than_eager(dtype, each_backend):
    y, scale, shift = operands((4, 6, 17, 15), dtype)
    z, index = stem_pool(y, scale, shift, PoolGeometry())
    eager = normalised(y, scale, shift).relu()
    eager.requires_grad_()
    pooled = max_pool2d(eager, 3, 2, 1)
    exact_u = rectified(y.double(), scale.double(), shift.double()).requires_grad_()
    exact = max_pool2d(exact_u, 3, 2, 1)
    assert_as_accurate_as_eager(z, pooled, exact)
    dz = torch.randn(z.shape).to(dtype)
    g = stem_pool_backward(OutputGrad(dz), index, tuple(y.shape), PoolGeometry())
    assert g.dtype == dtype
    # Ties in 16 bits are broken alike, so that only the order of up to four terms differs.
    (eager_g,) = torch.autograd.grad(pooled, eager, dz)
    assert_close(g, eager_g * (eager > 0), torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", LOW)
def test_what_rounds_to_zero_has_no_gradient(dtype, each_backend):
    y = torch.full((1, 1, 4, 4), torch.finfo(dtype).tiny, dtype=dtype)
    tiny = torch.full((1,), 2.0**-30)
    z, index = stem_pool(y, tiny, torch.zeros(1), PoolGeometry())
    assert torch.equal(index == NO_GRADIENT, z == 0)


def test_largest_window_has_an_index_for_every_tap(each_backend):
    pool = PoolGeometry((15, 17), (15, 17), (0, 0))
    y = torch.zeros(1, 1, 15, 17, dtype=torch.float64)
    y[0, 0, 14, 16] = 1.0
    z, index = stem_pool(y, torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), pool)
    assert (z.item(), index.item()) == (1.0, 254)
    g = stem_pool_backward(OutputGrad(torch.full_like(z, 3.0)), index, (1, 1, 15, 17), pool)
    assert torch.equal(g, 3 * y)


def test_refused_by_name(each_backend):
    y, v = torch.zeros(2, 4, 9, 9), torch.zeros(4)
    with pytest.raises(ValueError, match="y: expected a 4-D tensor"):
        stem_pool(y[0], v, v, PoolGeometry())
    with pytest.raises(ValueError, match=r"scale: expected shape \(4,\), got \(3,\)"):
        stem_pool(y, v[:3], v, PoolGeometry())
    with pytest.raises(ValueError, match=r"shift: expected shape \(4,\), got \(3,\)"):
        stem_pool(y, v, v[:3], PoolGeometry())
    with pytest.raises(ValueError, match=r"pool: expected a window of at most 255 pixels, got \(16, 16\)"):
        stem_pool(torch.zeros(1, 4, 16, 16), v, v, PoolGeometry((16, 16), (1, 1), (0, 0)))
    index = torch.zeros(2, 4, 5, 5, dtype=torch.uint8)
    with pytest.raises(ValueError, match="dz: expected 4 channels, got 3"):
        stem_pool_backward(OutputGrad(torch.zeros(2, 3, 5, 5)), index, (2, 4, 9, 9), PoolGeometry())
