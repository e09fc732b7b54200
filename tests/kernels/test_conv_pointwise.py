"""fusedres.kernels.conv_pointwise, compiled and executed: raw output and its statistics, of blocks with many tiles."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from fusedres.compiler.targets import TARGETS
from fusedres.operands import ConvInput, Geometry
from fusedres.ops.conv_forward import conv_forward
from fusedres.plan.pointwise_tiles import PointwiseTile, has_descriptors, pinned
from tests.comparison import LOW, assert_close
from tests.kernels.convolutions import assert_as_accurate
from tests.kernels.executed import TESTED, executed
from tests.kernels.test_conv_forward import check_statistics

TARGET = next((name for name in TESTED if name in TARGETS and has_descriptors(TARGETS[name])), None)
if TARGET is None:
    pytest.skip("no tensor descriptors here", allow_module_level=True)

# (N, C, H, W), K, and the tile.
CASES = {
    "a first stage's last layer": ((2, 64, 14, 14), 256, PointwiseTile(64, 128, 64, 8, 4, 2)),
    "deep columns": ((2, 256, 14, 14), 64, PointwiseTile(64, 64, 256, 8, 2, 3)),
    "a second stage's last layer": ((1, 128, 14, 14), 512, PointwiseTile(64, 128, 128, 8, 2, 2)),
    "as many outputs as inputs": ((3, 64, 10, 10), 64, PointwiseTile(128, 64, 64, 8, 3, 1)),
    "tails of pixels, K and C": ((1, 40, 9, 7), 24, PointwiseTile(64, 32, 64, 4, 3, 1)),
    "a last tile of one pixel": ((1, 16, 1, 129), 16, PointwiseTile(64, 16, 16, 4, 2, 2)),
    "fewer pixels than a tile": ((1, 8, 2, 3), 8, PointwiseTile(64, 16, 16, 4, 2, 1)),
    "a block for every tile": ((1, 64, 16, 16), 64, PointwiseTile(64, 64, 64, 4, 3, 4)),
}


def check(
    size: tuple[int, int, int, int], k: int, tile: PointwiseTile, dtype: torch.dtype, prologue: bool = False
) -> None:
    x = torch.randn(size).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(k, size[1], 1, 1) / size[1] ** 0.5).to(dtype)
    scale, shift = (torch.rand(size[1]) + 0.5, torch.randn(size[1])) if prologue else (None, None)
    with pinned(tile):
        (y, partials), trace = executed(
            TARGET, lambda: conv_forward(ConvInput(x, scale, shift), weight, Geometry(), statistics=True)
        )
    assert trace.by_kernel() == {"conv_pointwise_kernel": 1}
    assert len(partials.counts) == tile.parts
    assert trace.launches[0].steps == (-(-x.shape[0] * x.shape[2] * x.shape[3] // (tile.block_pixels * tile.parts)),)

    def formed(wide: torch.dtype) -> Tensor:
        if scale is None or shift is None:
            return x.to(wide)
        u = x.to(torch.promote_types(wide, torch.float32)) * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
        return torch.relu(u).to(wide)

    exact = conv2d(formed(torch.float64), weight.double())
    assert_as_accurate(y, conv2d(formed(dtype), weight), exact, None, size[1])
    check_statistics(y, partials)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_statistics(case: str) -> None:
    check(*CASES[case], LOW[list(CASES).index(case) % 2])


@pytest.mark.parametrize("case", [case for case, (size, _, _) in CASES.items() if size[1] <= 128])
def test_a_prologue(case: str) -> None:
    """What it makes of the zeros beyond the last pixel is not measured."""
    check(*CASES[case], LOW[list(CASES).index(case) % 2], prologue=True)


def test_slices_of_wider_rows() -> None:
    """Read and written where they are; what lies between stays as it is."""
    wide, out = (torch.randn(2, 96, 9, 9).half().contiguous(memory_format=torch.channels_last) for _ in range(2))
    before, x, y = out.clone(), wide[:, 16:80], out[:, 32:64]
    weight = torch.randn(32, 64, 1, 1).half() / 8
    with pinned(PointwiseTile(64, 32, 64, 4, 3, 2)):
        _, trace = executed(TARGET, lambda: conv_forward(ConvInput(x), weight, Geometry(), out=y), updated=[y])
    assert trace.by_kernel() == {"conv_pointwise_kernel": 1}
    assert_as_accurate(y, conv2d(x, weight), conv2d(x.double(), weight.double()), None, 64)
    assert torch.equal(out[:, :32], before[:, :32]) and torch.equal(out[:, 64:], before[:, 64:])


def test_large_means_do_not_cancel() -> None:
    """|mean| / std = 128 in every channel of y, over several tiles of each block."""
    x = torch.randn(1, 16, 20, 20).contiguous(memory_format=torch.channels_last).half()
    x[:, 0] = 1.0
    weight = torch.eye(16).view(16, 16, 1, 1).half()
    weight[:, 0] += 128.0
    with pinned(PointwiseTile(64, 16, 16, 4, 2, 2)):
        (y, partials), _ = executed(TARGET, lambda: conv_forward(ConvInput(x), weight, Geometry(), statistics=True))
    exact = torch.var(y[:, 1:].double(), (0, 2, 3), correction=0)
    mean = partials.counts.double() @ partials.mean.double() / 400
    spread = partials.counts.double() @ (partials.mean.double() - mean).square()
    assert_close(((partials.m2.double().sum(0) + spread) / 400)[1:], exact, 1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_its_pixel_and_its_statistics(value: float) -> None:
    x = torch.randn(1, 16, 9, 9).bfloat16().contiguous(memory_format=torch.channels_last)
    x[0, 3, 2, 2] = value
    weight = torch.eye(16).view(16, 16, 1, 1).bfloat16()
    with pinned(PointwiseTile(64, 16, 16, 4, 2, 1)):
        (y, partials), _ = executed(TARGET, lambda: conv_forward(ConvInput(x), weight, Geometry(), statistics=True))
    expected = conv2d(x, weight)
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isfinite(), expected.isfinite())
    assert not partials.m2[0].isfinite().any()


def half(*size: int) -> Tensor:
    return torch.randn(size).half().contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "x, weight",
    [
        (half(1, 20, 9, 9), half(16, 20, 1, 1)),
        (half(1, 16, 9, 9), half(12, 16, 1, 1)),
        (half(1, 24, 9, 9)[:, 4:20], half(16, 16, 1, 1)),
        (half(1, 28, 9, 9)[:, :16], half(16, 16, 1, 1)),
    ],
    ids=["C", "K", "where x begins", "the rows of x"],
)  # fmt: skip
def test_rows_that_no_descriptor_takes_go_the_other_way(x: Tensor, weight: Tensor) -> None:
    with pinned(PointwiseTile(64, 16, 32, 4, 2, 1)):
        (y, _), trace = executed(TARGET, lambda: conv_forward(ConvInput(x), weight, Geometry(), statistics=True))
    assert trace.by_kernel() == {"conv_forward_kernel": 1}
    assert_as_accurate(y, conv2d(x, weight), conv2d(x.double(), weight.double()), None, x.shape[1])
