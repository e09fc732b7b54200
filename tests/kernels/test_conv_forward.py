"""fusedres.kernels.conv_forward, compiled and executed: raw output and its statistics."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv2d

import fusedres
from fusedres.compiler.targets import TARGETS
from fusedres.operands import ConvInput, Geometry, Partials
from fusedres.ops.contractions import conv_shape, why_no_kernel
from fusedres.ops.conv_forward import conv_forward
from fusedres.plan.conv_tiles import TUNED, conv_tiles, pinned
from fusedres.runtime.launch import Trace
from tests.comparison import LOW, assert_as_accurate_as_eager, assert_close
from tests.kernels import random_convolutions
from tests.kernels.convolutions import NETWORKS, Conv, as_tf32, assert_as_accurate, convolutions_of
from tests.kernels.executed import TESTED, covering, executed
from tests.kernels.on_device import emulated_only
from tests.kernels.random_convolutions import reproducible

ODD = {
    "one pixel": Conv((1, 16, 1, 1), 24, (1, 1)),
    "one pixel, all of it padding but one tap": Conv((1, 16, 1, 1), 16, (3, 3), Geometry(padding=(1, 1))),
    "two images in one tile": Conv((2, 32, 5, 5), 32, (3, 3), Geometry(padding=(1, 1))),
    "tails of pixels, K and C": Conv((1, 40, 9, 7), 24, (3, 3), Geometry(padding=(1, 1))),
    "odd channels": Conv((1, 33, 6, 5), 17, (3, 3), Geometry(padding=(1, 1))),
    "strided past the last row": Conv((1, 32, 8, 9), 32, (3, 3), Geometry((2, 2), (1, 1))),
    "strided 1x1": Conv((2, 64, 7, 8), 64, (1, 1), Geometry((2, 2))),
    "stride 3 by 1": Conv((1, 16, 10, 7), 16, (3, 3), Geometry((3, 1), (1, 1))),
    "dilated": Conv((1, 32, 9, 9), 16, (3, 3), Geometry(padding=(2, 2), dilation=(2, 2))),
    "a window wider than high": Conv((1, 16, 6, 9), 16, (1, 5), Geometry(padding=(0, 2))),
    "padded 1x1": Conv((1, 16, 4, 4), 16, (1, 1), Geometry(padding=(1, 1))),
    "more padding than pixels": Conv((1, 16, 2, 2), 16, (5, 5), Geometry(padding=(4, 4))),
    "no padding": Conv((1, 16, 7, 7), 16, (3, 3)),
    "the stem, odd side": Conv((1, 3, 23, 30), 64, (7, 7), Geometry((2, 2), (3, 3))),
    "one channel": Conv((1, 1, 8, 8), 16, (3, 3), Geometry(padding=(1, 1))),
    "three channels, dilated": Conv((1, 3, 9, 9), 16, (3, 3), Geometry(padding=(2, 2), dilation=(2, 2))),
    "seven channels": Conv((1, 7, 6, 6), 8, (2, 2)),
    "groups of 4": Conv((1, 128, 6, 6), 128, (3, 3), Geometry(padding=(1, 1), groups=32)),
    "groups of 6, not a power of two": Conv((1, 30, 6, 6), 60, (3, 3), Geometry(padding=(1, 1), groups=5)),
    "two wide groups": Conv((1, 64, 6, 6), 160, (3, 3), Geometry(padding=(1, 1), groups=2)),
    "groups that widen": Conv((1, 8, 6, 6), 64, (3, 3), Geometry(padding=(1, 1), groups=4)),
}


def check(
    target: str, conv: Conv, dtype: torch.dtype, *, prologue: bool = False, statistics: bool = True
) -> tuple[Tensor, Partials | None, Trace]:
    """y and its statistics against fp64, in TF32 where that is what the library would use too."""
    x, weight = conv.input(dtype), conv.weight(dtype)
    scale, shift = (torch.rand(x.shape[1]) + 0.5, torch.randn(x.shape[1])) if prologue else (None, None)
    (y, partials), trace = executed(
        target, lambda: conv_forward(ConvInput(x, scale, shift), weight, conv.geometry, statistics=statistics)
    )
    packing = {"space_to_depth_kernel": 2} if "space_to_depth_kernel" in trace.by_kernel() else {}
    assert trace.by_kernel() == {"conv_forward_kernel": 1, **packing}
    assert y.is_contiguous(memory_format=torch.channels_last)

    def formed(wide: torch.dtype) -> Tensor:
        if scale is None or shift is None:
            return x.to(wide)
        u = x.to(torch.promote_types(wide, torch.float32)) * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
        return torch.relu(u).to(wide)

    exact = conv2d(formed(torch.float64), weight.double(), None, *conv.geometry)
    eager = conv2d(formed(dtype), weight, None, *conv.geometry)
    tf32 = None
    if dtype == torch.float32 and torch.backends.cudnn.allow_tf32 and target.startswith("sm"):
        tf32 = conv2d(as_tf32(formed(dtype)).double(), as_tf32(weight).double(), None, *conv.geometry)
    assert_as_accurate(y, eager, exact, tf32, conv.depth)
    if partials is not None:
        check_statistics(y, partials)
    return y, partials, trace


def check_statistics(y: Tensor, partials: Partials) -> None:
    """They are those of y as stored."""
    counts, means, m2 = (tensor.double() for tensor in partials)
    pixels = y.shape[0] * y.shape[2] * y.shape[3]
    assert counts.sum() == pixels
    mean = counts @ means / pixels
    var = (m2.sum(0) + counts @ (means - mean).square()) / pixels
    eager_var, eager_mean = torch.var_mean(y.float(), (0, 2, 3), correction=0)
    exact_var, exact_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    assert_as_accurate_as_eager(mean.float(), eager_mean, exact_mean)
    assert_as_accurate_as_eager(var.float(), eager_var, exact_var)


@pytest.mark.parametrize(("case", "target", "dtype"), covering(ODD, contraction=True))
def test_odd_shapes(case: str, target: str, dtype: torch.dtype) -> None:
    check(target, ODD[case], dtype, prologue=list(ODD).index(case) % 2 == 1)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "target", "dtype"), covering(ODD))
def test_odd_shapes_the_other_way(case: str, target: str, dtype: torch.dtype) -> None:
    check(target, ODD[case], dtype, prologue=list(ODD).index(case) % 2 == 0)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_shape_of_every_network(network: str) -> None:
    """The others are slow."""
    conv = convolutions_of(network)[len(network) % 5 + 1].smaller(4_000_000)
    target, dtype = TESTED[len(network) % len(TESTED)], LOW[len(network) % 2]
    check(target, conv, dtype, prologue=True)


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("target", "dtype"), [parameter.values[1:] for parameter in covering([""])])
def test_every_shape_of_every_network(network: str, target: str, dtype: torch.dtype) -> None:
    for i, conv in enumerate(convolutions_of(network)):
        check(target, conv.smaller(8_000_000), dtype, prologue=i % 2 == 1)


SHAPES = {
    "3x3": Conv((1, 128, 9, 9), 256, (3, 3), Geometry(padding=(1, 1))),
    "1x1": Conv((1, 192, 12, 13), 128, (1, 1)),
    "tails": Conv((1, 40, 9, 7), 72, (3, 3), Geometry(padding=(1, 1))),
}


@pytest.mark.parametrize("prologue", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "prologue"])
@pytest.mark.parametrize(("case", "target", "dtype"), covering(SHAPES, offset=1, contraction=True))
def test_every_tile(case: str, target: str, dtype: torch.dtype, prologue: bool) -> None:
    conv = SHAPES[case]
    shape = conv_shape(ConvInput(conv.input(dtype)), conv.weight(dtype), conv.geometry)
    tiles = conv_tiles(shape, TARGETS[target])
    assert len(tiles) >= (2 if TARGETS[target].arch in TUNED and dtype in LOW else 1)
    for tile in tiles:
        with pinned(tile):
            check(target, conv, dtype, prologue=prologue)


@pytest.mark.parametrize("target", TESTED)
@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
def test_exact_fp32(target: str, prologue: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    check(target, ODD["tails of pixels, K and C"], torch.float32, prologue=prologue)


@pytest.mark.parametrize("target", TESTED)
def test_padding_is_zero_and_not_relu_of_the_shift(target: str) -> None:
    """With a weight of ones and a zero image, an output counts the taps inside the image, each worth its shift."""
    x = torch.zeros(1, 16, 4, 4).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = torch.ones(16, 16, 3, 3).bfloat16().contiguous(memory_format=torch.channels_last)
    u = ConvInput(x, torch.ones(16), torch.full((16,), 0.5))
    (y, _), _ = executed(target, lambda: conv_forward(u, weight, Geometry(padding=(1, 1))))
    inside = conv2d(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3), padding=1)
    assert torch.equal(y.float(), (8 * inside).expand(1, 16, 4, 4))


@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
@pytest.mark.parametrize("target", TESTED)
def test_what_is_not_finite_reaches_the_windows_that_hold_it(target: str, prologue: bool) -> None:
    x = torch.randn(1, 16, 9, 9).bfloat16().contiguous(memory_format=torch.channels_last)
    x[0, 3, 2, 2], x[0, 5, 7, 7] = float("nan"), float("inf")
    weight = torch.randn(16, 16, 3, 3).bfloat16().contiguous(memory_format=torch.channels_last)
    numbers = (torch.ones(16), torch.zeros(16)) if prologue else (None, None)
    (y, _), _ = executed(target, lambda: conv_forward(ConvInput(x, *numbers), weight, Geometry(padding=(1, 1))))
    expected = conv2d(torch.relu(x) if prologue else x, weight, padding=1)
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert torch.equal(y.isnan(), expected.isnan())


RANDOM = {**random_convolutions.ON_TARGETS, "prologue": st.booleans()}


@settings(reproducible, max_examples=6)
@given(**RANDOM)
def test_random_shapes(conv: Conv, target: str, dtype: torch.dtype, prologue: bool) -> None:
    check(target, conv, dtype, prologue=prologue)


@pytest.mark.slow
@settings(reproducible, max_examples=300)
@given(**RANDOM)
def test_many_random_shapes(conv: Conv, target: str, dtype: torch.dtype, prologue: bool) -> None:
    check(target, conv, dtype, prologue=prologue)


@emulated_only
@pytest.mark.parametrize("target", TESTED)
def test_an_empty_batch_gives_an_empty_output(target: str) -> None:
    with patch("fusedres.ops.conv_forward.launch") as launch, fusedres.backend(f"vgpu:{target}"):
        y, _ = conv_forward(ConvInput(torch.empty(0, 16, 4, 4)), torch.randn(8, 16, 3, 3), Geometry())
    assert y.shape == (0, 8, 2, 2)
    assert launch.call_args.args[1] == (0,)


@emulated_only
@pytest.mark.parametrize("target", TESTED)
def test_few_bank_conflicts(target: str) -> None:
    """On average no access to shared memory takes more than two passes for one."""
    _, _, trace = check(target, SHAPES["3x3"], torch.bfloat16)
    counters = trace.launches[0].counters
    assert counters.shared_passes <= 2 * counters.ideal_shared_passes
    assert counters.tensor_ops > 0


@pytest.mark.parametrize("target", TESTED)
def test_large_means_do_not_cancel_in_a_tile(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """|mean| / std = 500 in every channel of y."""
    x = torch.randn(1, 16, 12, 12).contiguous(memory_format=torch.channels_last)
    x[:, 0] = 1.0
    weight = torch.eye(16).view(16, 16, 1, 1).clone()
    weight[:, 0] += 500.0
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    (y, partials), _ = executed(target, lambda: conv_forward(ConvInput(x), weight, Geometry(), statistics=True))
    exact = torch.var(y[:, 1:].double(), (0, 2, 3), correction=0)
    mean = partials.counts.double() @ partials.mean.double() / 144
    spread = partials.counts.double() @ (partials.mean.double() - mean).square()
    assert_close(((partials.m2.double().sum(0) + spread) / 144)[1:], exact, 1e-5)


@emulated_only
@pytest.mark.parametrize(
    ("weight", "geometry", "error", "message"),
    [
        (torch.ones(8, 5, 3, 3), Geometry(groups=3), ValueError, "groups: expected a positive divisor of 8"),
        (torch.ones(8, 4, 3, 3), Geometry(groups=2), ValueError, "u: expected 8 channels"),
        (torch.ones(8, 16, 3, 3), Geometry(padding=(-1, 0)), ValueError, "no negative padding"),
        (torch.ones(8, 16, 5, 5), Geometry(), ValueError, "4 x 4 pixels are too few for a 5 x 5 kernel"),
        (torch.ones(8, 16, 3, 3).bfloat16(), Geometry(), TypeError, "weight: expected the dtype of u"),
        (
            torch.ones(8, 16, 3, 3, device="meta"),
            Geometry(),
            ValueError,
            "weight: expected the device of u, cpu, got meta",
        ),
    ],
)
def test_what_makes_no_convolution_is_refused(
    weight: Tensor, geometry: Geometry, error: type[Exception], message: str
) -> None:
    with fusedres.backend("vgpu:sm_90"), pytest.raises(error, match=message):
        conv_forward(ConvInput(torch.ones(1, 16, 4, 4)), weight, geometry)


def test_more_pixels_than_32_bits_count_are_refused() -> None:
    x = torch.empty(2**16, 16, 2**8, 2**8, device="meta", dtype=torch.bfloat16)
    weight = torch.empty(16, 16, 1, 1, device="meta", dtype=torch.bfloat16)
    with fusedres.record(), pytest.raises(ValueError, match="pixels: expected a number of 32 bits, got 4294967296"):
        conv_forward(ConvInput(x), weight, Geometry(), statistics=True)


@emulated_only
@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (Conv((1, 32, 4, 4), 32, (3, 3), Geometry(padding=(1, 1), groups=32)), "depthwise"),
        (Conv((1, 16, 2, 32), 16, (1, 32)), "a window of 1 x 32 pixels: kernels take at most 31"),
    ],
)
def test_what_has_no_kernel_says_why_and_runs_without(conv: Conv, reason: str) -> None:
    u, weight = ConvInput(conv.input(torch.float32)), conv.weight(torch.float32)
    assert reason in why_no_kernel(u, weight, conv.geometry)
    with fusedres.backend("vgpu:sm_90"), fusedres.record() as trace:
        y, _ = conv_forward(u, weight, conv.geometry)
    assert not trace.launches
    assert_close(y, conv2d(u.tensor.double(), weight.double(), None, *conv.geometry), 1e-5)
