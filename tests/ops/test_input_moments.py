"""fusedres.ops.input_moments: centred Gram matrices that survive large means, and the statistics they give."""

import pytest
import torch

from fusedres.operands import ConvInput
from fusedres.ops import input_moments as module
from fusedres.ops.input_moments import input_moments, moments_statistics
from tests.comparison import LOW, STORAGE, assert_close, relative_error

# (N, C, H, W), stride
CASES = {
    "even": ((2, 8, 4, 4), (1, 1)),
    "odd": ((3, 5, 7, 3), (1, 1)),
    "strided": ((2, 6, 8, 8), (2, 2)),
    "strided, odd size": ((2, 6, 7, 5), (2, 2)),
    "strides differ": ((2, 3, 9, 7), (3, 1)),
    "one pixel": ((1, 4, 1, 1), (1, 1)),
    "one channel": ((2, 1, 3, 3), (1, 1)),
    "fewer pixels than channels": ((1, 40, 2, 3), (1, 1)),
}


def exactly(u: ConvInput, stride=(1, 1)):
    """(rows, mean, m2) in fp64, from the prologue's output as stored."""
    x = u.tensor[:, :, :: stride[0], :: stride[1]].double()
    if u.scale is not None:
        x = (x * u.scale.double()[:, None, None] + u.shift.double()[:, None, None]).clamp(min=0)
        x = x.to(u.tensor.dtype).double()
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    centred = rows - rows.mean(0)
    return rows, rows.mean(0), torch.einsum("nc,nd->cd", centred, centred)


def given(size, dtype, prologue):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensor = (torch.randn(size, dtype=wide) + 0.5).to(dtype)
    if not prologue:
        return ConvInput(tensor)
    scale, shift = torch.rand(2, size[1], dtype=wide) + 0.2
    return ConvInput(tensor, scale, shift)


def assert_moments(moments, u, stride, tolerance):
    rows, mean, m2 = exactly(u, stride)
    assert moments.pixels == len(rows)
    assert_close(moments.mean, mean, tolerance, name="mean")
    assert_close(moments.m2, m2, tolerance, scale=float(rows.square().sum()), name="m2")


@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
@pytest.mark.parametrize("case", CASES)
def test_is_the_definition(case, prologue, each_backend):
    size, stride = CASES[case]
    u = given(size, torch.float64, prologue)
    assert_moments(input_moments(u, stride), u, stride, 1e-13)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
def test_accumulates_in_fp32(dtype, prologue, each_backend):
    u = given((4, 9, 15, 13), dtype, prologue)
    moments = input_moments(u)
    assert moments.mean.dtype == moments.m2.dtype == torch.float32
    if prologue and dtype in LOW:
        # A value within fp32 rounding of a tie in storage may fall to either side.
        assert_moments(moments, u, (1, 1), 1e-5)
    else:
        assert_moments(moments, u, (1, 1), 1e-6)


@pytest.mark.parametrize("size", [(2, 8, 32, 32), (3, 8, 13, 17)], ids=["whole pieces", "last piece shorter"])
def test_many_pieces_are_one(size, monkeypatch, each_backend):
    monkeypatch.setattr(module, "_PIECE", 8 * 64)
    u = given(size, torch.float64, True)
    assert_moments(input_moments(u), u, (1, 1), 1e-13)


def test_one_row_per_piece(monkeypatch, each_backend):
    monkeypatch.setattr(module, "_PIECE", 1)
    u = given((2, 5, 3, 3), torch.float64, False)
    assert_moments(input_moments(u), u, (1, 1), 1e-13)


def test_more_rows_than_a_real_piece_holds(each_backend):
    u = given((2, 32, 80, 60), torch.float32, True)
    assert u.tensor.numel() > module._PIECE
    assert_moments(input_moments(u), u, (1, 1), 1e-6)


def of_mean_500(prologue):
    """|mean| / std = 500 in fp32."""
    tensor = (torch.randn(4, 16, 40, 40, dtype=torch.float64) + 500).float()
    if not prologue:
        return ConvInput(tensor)
    return ConvInput(tensor - 500, torch.ones(16), torch.full((16,), 500.0))


def variance(moments, weight):
    partials = moments_statistics(moments, weight)
    return partials.m2[0].double() / float(partials.counts)


@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
@pytest.mark.parametrize("piece", [1 << 18, 1 << 12], ids=["one piece", "many pieces"])
def test_large_mean_keeps_the_variance_in_fp32(piece, prologue, monkeypatch, each_backend):
    monkeypatch.setattr(module, "_PIECE", piece)
    u = of_mean_500(prologue)
    weight = torch.randn(32, 16, 1, 1)
    rows, _, _ = exactly(u)
    exact = (rows @ weight.flatten(1).double().t()).var(0, correction=0)
    assert_close(variance(input_moments(u), weight), exact, 1e-4)


def test_raw_moments_would_lose_the_variance():
    """What the reference row is for: the same bound fails by far without it."""
    u, weight = of_mean_500(False), torch.randn(32, 16, 1, 1)
    rows, _, _ = exactly(u)
    w = weight.flatten(1)
    exact = (rows @ w.double().t()).var(0, correction=0)
    s, gram = rows.float().sum(0), rows.float().t() @ rows.float()
    mean = s / len(rows)
    raw = ((w @ (gram / len(rows) - torch.outer(mean, mean))) * w).sum(1)
    assert relative_error(raw, exact) > 1e-3


def test_outlier_in_the_first_row_does_not_spoil_the_reference(each_backend):
    """Were the reference row the first row itself, its distance would be the mean that cancels."""
    tensor = torch.randn(4, 16, 40, 40)
    tensor[0, :, 0, 0] = 500.0
    tensor = tensor.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(32, 16, 1, 1)
    rows, _, m2 = exactly(ConvInput(tensor))
    moments = input_moments(ConvInput(tensor))
    assert_close(moments.m2, m2, 1e-5)
    exact = (rows @ weight.flatten(1).double().t()).var(0, correction=0)
    assert_close(variance(moments, weight), exact, 1e-5)


@pytest.mark.parametrize("value", [0.0, 3.0, 1e3])
def test_constant_input_has_no_variance(value, each_backend):
    moments = input_moments(ConvInput(torch.full((2, 5, 4, 4), value)))
    assert_close(moments.mean, torch.full((5,), value), 1e-6)
    partials = moments_statistics(moments, torch.randn(7, 5, 1, 1))
    assert (partials.m2 >= 0).all()
    assert partials.m2.abs().max() <= 1e-6 * max(value, 1.0) ** 2


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "strided view"])
def test_layout_does_not_matter(layout, each_backend):
    wide = torch.randn(2, 5, 6, 14, dtype=torch.float64)
    tensor = {
        "channels_last": wide[..., ::2].contiguous(memory_format=torch.channels_last),
        "contiguous": wide[..., ::2].contiguous(),
        "strided view": wide[..., ::2],
    }[layout]
    u = ConvInput(tensor)
    assert_moments(input_moments(u), u, (1, 1), 1e-13)


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_statistics_are_those_of_the_convolutions_output(stride, each_backend):
    u = given((3, 6, 7, 5), torch.float64, True)
    weight = torch.randn(11, 6, 1, 1, dtype=torch.float64)
    rows, _, _ = exactly(u, stride)
    y = rows @ weight.flatten(1).t()
    partials = moments_statistics(input_moments(u, stride), weight)
    assert partials.counts.tolist() == [len(rows)]
    assert_close(partials.mean[0], y.mean(0))
    assert_close(partials.m2[0], (y - y.mean(0)).square().sum(0))


@pytest.mark.parametrize("dtype", LOW)
def test_statistics_use_the_rounded_weight(dtype, each_backend):
    """They must belong to the contraction that the block end computes."""
    u = given((4, 9, 15, 13), dtype, False)
    weight = torch.randn(20, 9, 1, 1).to(dtype)
    rows, _, _ = exactly(u)
    exact = (rows @ weight.flatten(1).double().t()).var(0, correction=0)
    partials = moments_statistics(input_moments(u), weight)
    assert partials.m2.dtype == torch.float32
    assert_close(partials.m2[0] / len(rows), exact, 1e-5)


def test_refused_by_name(each_backend):
    with pytest.raises(ValueError, match="u: expected a 4-D tensor"):
        input_moments(ConvInput(torch.zeros(3, 4)))
    with pytest.raises(TypeError, match="u: expected a floating-point tensor"):
        input_moments(ConvInput(torch.zeros(1, 3, 4, 4, dtype=torch.uint8)))
