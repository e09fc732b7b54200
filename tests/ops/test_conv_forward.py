"""fusedres.ops.conv_forward: the definition of a convolution, a prologue before the padding, statistics of y."""

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from fusedres.bench.eager import normalised
from fusedres.operands import ConvInput, Geometry
from fusedres.ops.conv_forward import conv_forward, conv_operand
from tests.comparison import LOW, STORAGE, assert_as_accurate_as_eager, assert_close, naive_conv

# (N, C, H, W), (K, R, S), geometry
CASES = {
    "3x3": ((2, 5, 6, 6), (7, 3, 3), Geometry(padding=(1, 1))),
    "3x3 strided, odd size": ((2, 5, 9, 7), (6, 3, 3), Geometry((2, 2), (1, 1))),
    "3x3 dilated": ((2, 4, 9, 8), (6, 3, 3), Geometry((1, 1), (2, 2), (2, 2))),
    "3x3 grouped": ((2, 6, 5, 5), (9, 3, 3), Geometry(padding=(1, 1), groups=3)),
    "depthwise": ((2, 5, 6, 7), (5, 3, 3), Geometry((2, 2), (1, 1), groups=5)),
    "7x7 on three channels": ((2, 3, 16, 15), (8, 7, 7), Geometry((2, 2), (3, 3))),
    "1x1": ((3, 10, 4, 5), (13, 1, 1), Geometry()),
    "1x1 strided, odd size": ((2, 6, 7, 5), (9, 1, 1), Geometry((2, 2))),
    "1x1 with padding": ((2, 6, 3, 3), (9, 1, 1), Geometry(padding=(1, 1))),
    "nothing square": ((1, 4, 11, 8), (6, 5, 2), Geometry((3, 2), (2, 0), (1, 3))),
    "one pixel": ((1, 3, 1, 1), (4, 3, 3), Geometry(padding=(1, 1))),
    "one channel": ((2, 1, 4, 4), (1, 3, 3), Geometry(padding=(1, 1))),
}


def operands(case, dtype, prologue, mean=0.0):
    size, (k, r, s), geometry = CASES[case]
    u = torch.randn(size, dtype=torch.float64) + mean
    weight = torch.randn(k, size[1] // geometry.groups, r, s, dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale = (torch.rand(size[1], dtype=torch.float64) + 0.5).to(wide) if prologue else None
    shift = (torch.rand(size[1], dtype=torch.float64) + 0.1).to(wide) if prologue else None
    return ConvInput(u.to(dtype), scale, shift), weight.to(dtype), geometry


def on_load(u: ConvInput) -> torch.Tensor:
    if u.scale is None:
        return u.tensor
    return (u.tensor * u.scale[:, None, None] + u.shift[:, None, None]).clamp(min=0)


@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
@pytest.mark.parametrize("case", CASES)
def test_is_the_definition(case, prologue, each_backend):
    u, weight, geometry = operands(case, torch.float64, prologue)
    y, partials = conv_forward(u, weight, geometry)
    assert_close(y, naive_conv(on_load(u), weight, *geometry))
    assert partials is None


def test_padding_is_zero_after_the_prologue(each_backend):
    u, weight, geometry = operands("3x3", torch.float64, True)
    y, _ = conv_forward(u, weight, geometry)
    padded_first = ConvInput(nn.functional.pad(u.tensor, (1, 1, 1, 1)), u.scale, u.shift)
    wrong = naive_conv(on_load(padded_first), weight)
    assert torch.allclose(y[:, :, 1:-1, 1:-1], wrong[:, :, 1:-1, 1:-1])
    # shift > 0, so a border of relu(shift) instead of zeros is far off.
    assert (y - wrong)[:, :, 0].abs().min() > 1e-3
    assert_close(y, naive_conv(on_load(u), weight, *geometry))


@pytest.mark.parametrize("dtype", [torch.float64, *STORAGE])
@pytest.mark.parametrize("case", ["3x3", "1x1", "one pixel", "3x3 strided, odd size"])
def test_statistics_are_those_of_y_as_stored(case, dtype, each_backend):
    u, weight, geometry = operands(case, dtype, True, mean=3.0)
    y, partials = conv_forward(u, weight, geometry, statistics=True)
    assert y.dtype == dtype
    stored = y.double()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    mean = stored.mean((0, 2, 3))
    assert partials.counts.sum() == y.numel() // y.shape[1]
    assert_close((partials.mean * partials.counts[:, None]).sum(0) / partials.counts.sum(), mean, tolerance)
    spread = (partials.mean - mean).square() * partials.counts[:, None]
    m2 = (stored - mean[:, None, None]).square().sum((0, 2, 3))
    assert_close((partials.m2 + spread).sum(0), m2, tolerance, name="m2")
    assert partials.mean.dtype == partials.m2.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
@pytest.mark.parametrize("case", CASES)
def test_rounds_no_more_than_eager(case, prologue, dtype, each_backend):
    u, weight, geometry = operands(case, dtype, prologue)
    y, _ = conv_forward(u, weight, geometry)
    eager = u.tensor
    if prologue:
        eager = normalised(eager, u.scale, u.shift).relu()
    eager = conv2d(eager, weight, None, *geometry)
    wide = ConvInput(*(None if part is None else part.double() for part in u[:3]))
    assert_as_accurate_as_eager(y, eager, naive_conv(on_load(wide), weight.double(), *geometry))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layout_of_the_input_does_not_matter(layout, each_backend):
    u, weight, geometry = operands("3x3", torch.float64, True)
    exact = naive_conv(on_load(u), weight, *geometry)
    stored = u._replace(tensor=u.tensor.contiguous(memory_format=layout))
    assert_close(conv_forward(stored, weight.contiguous(memory_format=layout), geometry)[0], exact)
    wider = torch.randn(2, 5, 6, 12, dtype=torch.float64)
    wider[..., ::2] = u.tensor
    assert_close(conv_forward(u._replace(tensor=wider[..., ::2]), weight, geometry)[0], exact)


@pytest.mark.parametrize("dtype", LOW)
def test_formed_operand_is_rounded_to_storage(dtype, each_backend):
    u, _, _ = operands("3x3", dtype, True)
    out = conv_operand(u)
    assert out.dtype == dtype
    exact = on_load(ConvInput(*(part.double() for part in u[:3])))
    assert (out.double() - exact).abs().max() <= torch.finfo(dtype).eps / 2 * exact.max()
    assert conv_operand(ConvInput(u.tensor)) is u.tensor


@pytest.mark.parametrize(
    ("u", "weight", "geometry", "exception", "message"),
    [
        (torch.zeros(4, 5, 5), torch.zeros(6, 4, 1, 1), Geometry(), ValueError, "u: expected a 4-D tensor"),
        (torch.zeros(1, 3, 5, 5), torch.zeros(6, 4, 1, 1), Geometry(), ValueError, "u: expected 4 channels"),
        (torch.zeros(1, 4, 5, 5), torch.zeros(6, 4, 1), Geometry(), ValueError, "weight: expected shape"),
        (torch.zeros(1, 4, 5, 5), torch.zeros(6, 4, 1, 1).half(), Geometry(), TypeError, "weight: .*dtype of u"),
        (torch.zeros(1, 4, 5, 5).long(), torch.zeros(6, 4, 1, 1), Geometry(), TypeError, "u: .*floating-point"),
        (torch.zeros(1, 4, 5, 5), torch.zeros(6, 4, 7, 7), Geometry(), ValueError, "u: 5 x 5 pixels are too few"),
        (torch.zeros(1, 4, 5, 5), torch.zeros(6, 1, 1, 1), Geometry(groups=4), ValueError, "groups: .*got 4"),
    ],
)
def test_refused_by_name(u, weight, geometry, exception, message, each_backend):
    with pytest.raises(exception, match=message):
        conv_forward(ConvInput(u), weight, geometry)
