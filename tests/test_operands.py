"""fusedres.operands: sizes, layouts and the checks at the door."""

import pytest
import torch
from torch.nn.functional import conv2d, max_pool2d

from fusedres.operands import ConvInput, Geometry, PoolGeometry, statistics_dtype
from fusedres.ops.checks import check_activation, check_conv, check_vector
from fusedres.ops.rows import as_rows, channels_last, from_rows, pixels


@pytest.mark.parametrize(
    ("size", "kernel", "geometry"),
    [
        ((7, 5), (3, 3), Geometry(padding=(1, 1))),
        ((8, 9), (3, 3), Geometry((2, 2), (1, 1))),
        ((9, 6), (1, 1), Geometry((2, 2))),
        ((11, 13), (3, 3), Geometry((1, 1), (2, 2), (2, 2))),
        ((12, 7), (5, 3), Geometry((3, 2), (2, 0), (2, 3))),
        ((1, 1), (7, 7), Geometry((2, 2), (3, 3))),
    ],
)
def test_output_size_is_the_convolutions(size, kernel, geometry):
    y = conv2d(torch.zeros(1, 2, *size), torch.zeros(1, 2, *kernel), None, *geometry)
    assert geometry.output_size(*size, kernel) == tuple(y.shape[2:])


@pytest.mark.parametrize("size", [(7, 5), (8, 8), (1, 2)])
@pytest.mark.parametrize(
    "pool", [PoolGeometry(), PoolGeometry((2, 2), (2, 2), (0, 0)), PoolGeometry((3, 2), (1, 3), (1, 0))]
)
def test_output_size_is_the_pools(size, pool):
    if min(pool.output_size(*size)) < 1:
        pytest.skip("no window fits")
    assert pool.output_size(*size) == tuple(max_pool2d(torch.zeros(1, 1, *size), *pool).shape[2:])


def test_statistics_are_never_narrower_than_fp32():
    wide = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float32}
    assert {dtype: statistics_dtype(dtype) for dtype in wide} == wide
    assert statistics_dtype(torch.float64) == torch.float64


def test_rows_of_channels_last_are_a_view_and_come_back():
    x = channels_last(torch.randn(2, 3, 4, 5))
    rows = as_rows(x)
    assert rows.shape == (pixels(x), 3) == (40, 3)
    assert rows.data_ptr() == x.data_ptr()
    assert torch.equal(rows[(1 * 4 + 2) * 5 + 3], x[1, :, 2, 3])
    back = from_rows(rows, x)
    assert torch.equal(back, x)
    assert back.stride() == x.stride()


def test_rows_of_other_layouts_are_the_same_rows():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(as_rows(x), as_rows(channels_last(x)))
    assert torch.equal(as_rows(x[:, :, ::2, ::3]), as_rows(channels_last(x[:, :, ::2, ::3])))


IMAGE, WEIGHT = torch.zeros(2, 4, 5, 5), torch.zeros(6, 4, 3, 3)

# call, exception, message
REFUSED = {
    "3-D": (lambda: check_activation("u", IMAGE[0]), ValueError, r"u: expected a 4-D tensor .* \(4, 5, 5\)"),
    "integer": (lambda: check_activation("u", IMAGE.int()), TypeError, "u: expected a floating-point .*int32"),
    "channels": (lambda: check_activation("u", IMAGE, 3), ValueError, "u: expected 3 channels, got 4"),
    "vector length": (lambda: check_vector("beta", torch.zeros(3), 4), ValueError, r"beta: .*\(4,\), got \(3,\)"),
    "vector rank": (lambda: check_vector("beta", torch.zeros(1, 4), 4), ValueError, r"beta: .*got \(1, 4\)"),
    "activation elsewhere": (
        lambda: check_activation("u", IMAGE, device=torch.device("meta")),
        ValueError,
        "u: .* on meta, got cpu",
    ),
    "vector elsewhere": (
        lambda: check_vector("beta", torch.zeros(4), 4, torch.device("meta")),
        ValueError,
        "beta: expected it on meta, got cpu",
    ),
    "weight rank": (lambda: check_conv(ConvInput(IMAGE), WEIGHT[0], Geometry()), ValueError, "weight: expected shape"),
    "weight channels": (
        lambda: check_conv(ConvInput(IMAGE), WEIGHT[:, :3], Geometry(), name="x"),
        ValueError,
        r"x: expected 3 channels for weight \(6, 3, 3, 3\) in 1 group",
    ),
    "group channels": (
        lambda: check_conv(ConvInput(IMAGE), WEIGHT, Geometry(groups=2)),
        ValueError,
        "input: expected 8 channels .* in 2 group",
    ),
    "groups": (lambda: check_conv(ConvInput(IMAGE), WEIGHT, Geometry(groups=4)), ValueError, "groups: .* 6 .*, got 4"),
    "no groups": (lambda: check_conv(ConvInput(IMAGE), WEIGHT, Geometry(groups=0)), ValueError, "groups: .*, got 0"),
    "pixels": (
        lambda: check_conv(ConvInput(IMAGE[:, :, :2]), WEIGHT, Geometry()),
        ValueError,
        "2 x 5 pixels are too few",
    ),
    "dtypes": (
        lambda: check_conv(ConvInput(IMAGE), WEIGHT.half(), Geometry()),
        TypeError,
        "weight: expected the dtype of input, torch.float32, got torch.float16",
    ),
    "devices": (
        lambda: check_conv(ConvInput(IMAGE), WEIGHT.to("meta"), Geometry()),
        ValueError,
        "weight: expected the device of input, cpu, got meta",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    call, exception, message = REFUSED[case]
    with pytest.raises(exception, match=message):
        call()
