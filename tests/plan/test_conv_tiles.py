"""fusedres.plan.conv_tiles: what it chooses fits into the registers of its target, and into how many parts it cuts."""

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch

import fusedres
from fusedres.compiler.binary import compile_binary
from fusedres.compiler.budgets import violations
from fusedres.compiler.figures import read_figures
from fusedres.compiler.targets import TARGETS
from fusedres.operands import ConvInput, Geometry, OutputGrad, PoolGeometry
from fusedres.ops.conv_backward import conv_producer_backward
from fusedres.ops.conv_weight_grad import conv_weight_grad
from fusedres.ops.stem_contractions import output_contraction, pooled_contraction
from fusedres.plan.conv_tiles import ENOUGH_TILES, FILLING, conv_tiles, pinned, weight_grad_tiles
from fusedres.plan.gpus import target_gpu
from fusedres.plan.shapes import ConvVariant
from tests.budgets import held_to
from tests.plan.convolutions import (
    FP32,
    around,
    forward,
    gradient_of,
    input_gradient,
    input_of,
    on_meta,
    producer_of,
    two_contractions,
    weight_gradient,
)


def weight_grad_of_moments() -> None:
    weight_gradient((64, 128, 14, 14), 256, 1, FP32, formed=False, mask=True, sum_dy=True)


def weight_grad_of_a_window() -> None:
    weight_gradient((64, 128, 14, 14), 128, 3, FP32)


def weight_grad_of_few_channels() -> None:
    dy = OutputGrad(on_meta(64, 32, 16, 16), None, None, on_meta(32))
    conv_weight_grad(dy, ConvInput(on_meta(64, 64, 16, 16)), (3, 3), around(3))


def weight_grad_of_the_stem() -> None:
    weight_gradient((64, 3, 224, 224), 64, 7, FP32, formed=False, input_formed=False, stride=2, sum_u=True)


def weight_grad_of_a_basic_block() -> None:
    weight_gradient((64, 64, 56, 56), 64, 3, mask=True)


def block_end_with_projection() -> None:
    two_contractions((64, 64, 14, 14), 256, 1, FP32, mask=True)


def preactivation_with_projection() -> None:
    two_contractions((256, 64, 16, 16), 256, second_formed=True)


def preactivation_with_a_narrow_projection() -> None:
    two_contractions((256, 16, 32, 32), 64)


def window_of_a_narrow_network() -> None:
    forward((256, 32, 16, 16), 64, 3, stride=2)


def pointwise_that_narrows() -> None:
    forward((256, 64, 32, 32), 16, formed=True)


def input_grad_of_a_preactivation() -> None:
    """Joined to the shortcut's gradient and then to the producer's ReLU."""
    input_gradient((256, 256, 16, 16), 128, 1, FP32, producer=True, add=True)


def input_grad_of_a_projection() -> None:
    input_gradient((64, 128, 28, 28), 256, 1, FP32, mask=True, stride=2)


def input_grad_of_groups() -> None:
    """Of a strided 3x3 convolution of ResNeXt-50 behind its producer's ReLU."""
    input_gradient((64, 512, 28, 28), 512, 3, producer=True, stride=2, groups=32)


def input_grad_of_a_formed_gradient() -> None:
    input_gradient((256, 128, 14, 14), 256, 1, torch.float16)


def input_grad_in_fp32() -> None:
    input_gradient((256, 64, 28, 28), 128, 1, FP32)


def weight_grad_of_a_window_with_bits() -> None:
    weight_gradient((256, 64, 8, 8), 64, 3, mask=True)


@pytest.mark.parametrize(
    ("call", "target"),
    [
        pytest.param(weight_grad_of_moments, "sm_80", id="TF32 of 128 x 128"),
        pytest.param(weight_grad_of_a_window, "sm_86", id="TF32 in steps of 32 pixels"),
        pytest.param(weight_grad_of_few_channels, "sm_100", id="TF32 by four warps on sm_100"),
        pytest.param(weight_grad_of_the_stem, "sm_90", id="TF32 of a whole window"),
        pytest.param(weight_grad_of_moments, "gfx1100", id="fp32 without matrix units"),
        pytest.param(weight_grad_of_a_basic_block, "sm_86", id="both operands formed, and bits"),
        pytest.param(block_end_with_projection, "gfx1100", id="outputs that wait in fp32"),
        pytest.param(preactivation_with_projection, "gfx942", id="two formed operands wait in registers"),
        pytest.param(preactivation_with_a_narrow_projection, "sm_86", id="outputs that wait for a projection"),
        pytest.param(window_of_a_narrow_network, "sm_100", id="a window of 64 x 64 outputs"),
        pytest.param(pointwise_that_narrows, "sm_120", id="a narrow tile behind a prologue"),
        pytest.param(input_grad_of_a_preactivation, "sm_90", id="much joined to a gradient in fp32"),
        pytest.param(input_grad_of_a_projection, "gfx1100", id="a gradient in fp32 without matrix units"),
        pytest.param(input_grad_of_groups, "sm_86", id="block-diagonal weights"),
        pytest.param(input_grad_of_a_formed_gradient, "sm_100", id="a formed gradient in 128 registers"),
        pytest.param(input_grad_in_fp32, "sm_120", id="a formed gradient in fp32"),
        pytest.param(weight_grad_of_a_window_with_bits, "sm_86", id="both operands formed, and a padded window"),
    ],
)
def test_what_spilled_once_spills_no_more(call: Callable[[], None], target: str) -> None:
    with fusedres.record(target) as trace:
        call()
    assert any(launch.name.startswith("conv_") for launch in trace.launches)
    for launch in trace.launches:
        assert violations(launch.binary, target, read_figures(compile_binary(launch.binary, target), target)) == []


PLAIN, FORMED = {"sm_80 128": 0.45, "sm_90 128": 0.55, "sm_90 256": 0.3}, {
    "sm_80 128": 0.7, "sm_90 128": 1.0, "sm_90 256": 0.6,
}  # fmt: skip


@pytest.mark.parametrize("window", [1, 3], ids=["1x1", "3x3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "formed"])
@pytest.mark.parametrize("which", PLAIN)
def test_tensor_cores_need_not_wait_for_instructions(
    which: str, prologue: bool, dtype: torch.dtype, window: int
) -> None:
    """Cycles to issue a main loop over those of its multiplications, as the widest tiles of each target have them."""
    target, width = which.split()
    conv = ConvVariant(256 * 28**2, 256, 256, 1, window, window, 2, prologue=prologue)
    tiles = conv_tiles(conv, TARGETS[target])
    with fusedres.record(target) as trace, pinned(next(tile for tile in tiles if tile.block_k == int(width))):
        forward((256, 256, 28, 28), 256, window, dtype, formed=prologue)
    (launch,) = trace.launches
    figures = read_figures(compile_binary(launch.binary, target), target)
    assert violations(launch.binary, target, figures) == []
    assert figures.issue is not None
    what = f"{which}, {'formed' if prologue else 'plain'}, {window}x{window}"
    assert figures.issue <= held_to((FORMED if prologue else PLAIN)[which], what)


# Of 1x1 and 3x3: what is formed of the operands, and the cycles above. Forming takes what is left of them.
WEIGHT_GRADS = {
    ("sm_80", "u"): (0.75, 0.8), ("sm_80", "dy"): (0.85, 1.05), ("sm_80", "both"): (1.2, 1.25),
    ("sm_80", "both, bits"): (1.3, 1.35), ("sm_90", "u"): (0.7, 1.1), ("sm_90", "dy"): (1.6, 2.0),
    ("sm_90", "both"): (1.8, 2.1), ("sm_90", "both, bits"): (2.0, 2.4),
}  # fmt: skip


@pytest.mark.parametrize("window", [1, 3], ids=["1x1", "3x3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("target", "form"), WEIGHT_GRADS)
def test_the_loop_over_pixels_is_not_spent_on_addresses(
    target: str, form: str, dtype: torch.dtype, window: int
) -> None:
    what = {"formed": form != "u", "input_formed": form != "dy", "mask": "bits" in form}
    with fusedres.record(target) as trace:
        weight_gradient((256, 256, 14, 14), 256, window, dtype, **what)
    figures = read_figures(compile_binary(trace.launches[0].binary, target), target)
    assert figures.issue is not None
    bar = WEIGHT_GRADS[target, form][window // 2]
    assert figures.issue <= held_to(bar, f"{target}, {form}, {window}x{window}")


@pytest.mark.parametrize("target", ["sm_90", "sm_80"])
@pytest.mark.parametrize("channels", [64, 256])
def test_a_gradient_is_written_where_forming_it_takes_longer(target: str, channels: int) -> None:
    """Both gradients of ResNet-50's 3x3, by bytes, FLOPs and the instructions of the compiled loops."""
    gpu, dtype = target_gpu(TARGETS[target]), torch.bfloat16
    size = (256, channels, 56 * 64 // channels, 56 * 64 // channels)
    u, dy, geometry, producer = input_of(size, dtype), gradient_of(size, dtype), around(3), producer_of(size, dtype)
    seconds = []
    for written in (False, True):
        with fusedres.record(target) as trace, patch("fusedres.ops.conv_backward.writing_pays", return_value=written):
            conv_producer_backward(dy, u, on_meta(channels, channels, 3, 3, dtype=dtype), geometry, producer)
        assert ("bn_backward_apply_kernel" in trace.by_kernel()) is written
        seconds.append(0.0)
        for launch in trace.launches:
            issue = read_figures(compile_binary(launch.binary, target), target).issue
            moving = (launch.bytes_read + launch.bytes_written) / gpu.bandwidth
            seconds[-1] += max(moving, launch.flops / gpu.rate(dtype) * max(1.0, issue or 0.0))
    assert seconds[1] < 0.9 * seconds[0]


@pytest.mark.parametrize(("target", "bars"), [("sm_80", (2.0, 4.2)), ("sm_90", (4.0, 7.1))])
def test_nor_is_that_of_the_stem(target: str, bars: tuple[float, float]) -> None:
    """Of its raw output with the image, and of the gradient that max-pooling lets through."""
    x, y, dz = (on_meta(256, *size, dtype=torch.bfloat16) for size in ((3, 224, 224), (64, 112, 112), (64, 56, 56)))
    maxima = on_meta(256, 64, 56, 56, dtype=torch.uint8)
    geometry, pool = Geometry((2, 2), (3, 3)), PoolGeometry((3, 3), (2, 2), (1, 1))
    with fusedres.record(target) as trace:
        output_contraction(y, on_meta(64), ConvInput(x), (7, 7), geometry)
        pooled_contraction(OutputGrad(dz), maxima, tuple(y.shape), pool, ConvInput(x), (7, 7), geometry)
    contractions = [launch.binary for launch in trace.launches if launch.name == "conv_weight_grad_kernel"]
    for binary, bar in zip(contractions, bars, strict=True):
        figures = read_figures(compile_binary(binary, target), target)
        assert figures.issue is not None
        assert figures.issue <= bar


TARGETS_OF_TABLES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
# Pixels, channels of the output, depth; warps and stages.
CHOSEN = {
    "conv2 of ResNet-50, 128 channels": (
        ConvVariant(200704, 128, 128, 1, 3, 3, 2, prologue=True),
        "128x128x64 8 4 | 128x128x64 8 3 | 128x128x64 8 3 | 128x128x64 8 3 | 32x64x64 4 2 | 32x64x64 4 2",
    ),
    "conv3 of ResNet-50": (
        ConvVariant(802816, 64, 256, 1, 1, 1, 2, prologue=True),
        "128x128x32 4 4 | 128x128x64 8 3 | 128x128x64 8 3 | 128x128x64 8 3 | 32x64x64 4 2 | 32x64x64 4 2",
    ),
    "the same in fp32": (
        ConvVariant(802816, 64, 256, 1, 1, 1, 4, prologue=True),
        "128x128x32 8 4 | 128x128x32 8 3 | 128x128x32 8 3 | 128x128x32 8 3 | 32x64x32 4 2 | 32x64x32 4 2",
    ),
    "conv1 of ResNet-50, plain": (
        ConvVariant(200704, 512, 128, 1, 1, 1, 2),
        "128x128x64 8 4 | 128x128x64 8 3 | 128x128x64 8 3 | 128x128x64 8 3 | 64x64x64 4 2 | 64x64x64 4 2",
    ),
    "a stem": (
        ConvVariant(3211264, 3, 64, 1, 7, 7, 2, flat=True),
        "128x64x32 8 4 | 128x64x32 8 4 | 128x64x32 8 4 | 128x64x32 8 4 | 32x64x32 4 4 | 32x64x32 4 4",
    ),
    "a block's end beside its shortcut": (
        ConvVariant(200704, 128, 512, 1, 1, 1, 2, prologue=True, epilogue_bytes=2),
        "128x128x32 4 4 | 128x128x64 8 3 | 64x128x64 8 4 | 128x128x64 8 3 | 32x64x64 4 2 | 32x64x64 4 2",
    ),
    "a block's end and its projection": (
        ConvVariant(802816, 64, 256, 1, 1, 1, 2, prologue=True, second=True, epilogue_bytes=1),
        "128x64x64 8 3 | 128x64x64 8 4 | 128x64x64 8 4 | 128x64x64 8 2 | 32x64x32 4 2 | 32x64x32 4 2",
    ),
    "groups of 4 channels": (
        ConvVariant(802816, 4, 4, 32, 3, 3, 2, prologue=True),
        "128x32x32 8 4 | 128x32x32 4 4 | 128x32x32 4 4 | 128x32x32 8 4 | 32x32x32 4 2 | 32x32x32 4 2",
    ),
    "an input's gradient": (
        ConvVariant(200704, 512, 128, 1, 1, 1, 2, prologue=True, operands=2, gradient=True),
        "128x64x64 8 2 | 128x128x64 8 2 | 128x128x64 8 2 | 128x64x64 8 2 | 32x64x64 4 2 | 32x64x32 4 2",
    ),
    "an input's gradient in fp32": (
        ConvVariant(200704, 128, 128, 1, 3, 3, 4, prologue=True, operands=2, gradient=True),
        "128x64x32 8 2 | 128x64x32 8 2 | 128x64x32 8 2 | 128x64x32 8 2 | 32x64x32 4 2 | 32x64x16 4 2",
    ),
    "a gradient of moments": (
        ConvVariant(200704, 512, 128, 1, 1, 1, 2, prologue=True, second=True, operands=2, gradient=True),
        "128x64x64 8 2 | 128x128x64 8 2 | 64x128x64 8 3 | 128x64x64 8 2 | 32x64x32 4 2 | 32x64x32 4 2",
    ),
    "features' gradients": (
        ConvVariant(200704, 128, 256, 1, 1, 1, 2, prologue=True, epilogue_bytes=2, operands=2, gradient=True),
        "128x64x64 8 2 | 128x64x64 8 2 | 128x64x64 8 2 | 128x64x64 8 2 | 32x64x64 4 2 | 32x64x32 4 2",
    ),
    "few pixels of many channels": (
        ConvVariant(49, 512, 2048, 1, 1, 1, 2, prologue=True),
        "64x64x64 4 4 | 64x64x64 4 4 | 64x64x64 4 4 | 64x64x64 4 3 | 32x64x64 4 2 | 32x64x64 4 2",
    ),
}
# Pixels of a step, channels of output and input; warps and parts.
CHOSEN_FOR_WEIGHTS = {
    "1x1": (
        ConvVariant(200704, 128, 512, 1, 1, 1, 2),
        "32x128x128 8 32 | 64x128x128 8 32 | 64x128x128 8 32 | 32x128x128 8 32 | 32x128x128 8 32 | 64x64x64 4 16",
    ),
    "1x1, dy formed": (
        ConvVariant(200704, 512, 128, 1, 1, 1, 2, operands=2),
        "32x128x128 8 32 | 32x128x128 8 32 | 32x128x128 8 32 | 32x128x128 8 32 | 32x128x128 8 32 | 32x64x64 4 16",
    ),
    "3x3 of 64 channels": (
        ConvVariant(802816, 64, 64, 1, 3, 3, 2),
        "64x64x64 4 28 | 64x64x64 4 28 | 64x64x64 4 28 | 64x64x64 4 28 | 64x64x64 4 28 | 64x64x64 4 28",
    ),
    "3x3 in fp32": (
        ConvVariant(200704, 128, 128, 1, 3, 3, 4, operands=2),
        "16x128x64 8 14 | 16x128x64 8 14 | 16x128x64 8 14 | 16x128x64 8 14 | 32x128x128 8 14 | 16x32x64 4 3",
    ),
    "a stem": (
        ConvVariant(3211264, 3, 64, 1, 7, 7, 2, flat=True),
        "16x64x256 8 128 | 16x64x256 8 128 | 16x64x256 8 128 | 16x64x256 8 128 | 16x64x64 8 85 | 16x64x64 8 85",
    ),
    "a stem in fp32": (
        ConvVariant(3211264, 3, 64, 1, 7, 7, 4, flat=True),
        "16x64x128 8 128 | 16x64x128 8 128 | 16x64x128 8 128 | 16x64x128 8 128 | 16x64x64 8 85 | 16x32x64 8 42",
    ),
    "groups of 8 channels": (
        ConvVariant(200704, 8, 8, 32, 3, 3, 2, operands=2),
        "32x64x64 4 7 | 32x64x64 4 7 | 32x64x64 4 7 | 32x64x64 4 7 | 32x64x64 4 7 | 32x64x64 4 7",
    ),
}


@pytest.mark.parametrize("case", CHOSEN)
def test_what_is_chosen_for_the_convolutions_of_models(case: str) -> None:
    conv, tiles = CHOSEN[case]
    found = [conv_tiles(conv, TARGETS[name])[0] for name in TARGETS_OF_TABLES]
    words = [f"{t.block_pixels}x{t.block_k}x{t.block_c} {t.num_warps} {t.num_stages}" for t in found]
    assert words == tiles.split(" | ")


@pytest.mark.parametrize("case", CHOSEN_FOR_WEIGHTS)
def test_what_is_chosen_for_their_weights(case: str) -> None:
    conv, tiles = CHOSEN_FOR_WEIGHTS[case]
    found = [weight_grad_tiles(conv, TARGETS[name])[0] for name in TARGETS_OF_TABLES]
    assert [f"{t.block_pixels}x{t.block_k}x{t.block_c} {t.num_warps} {t.parts}" for t in found] == tiles.split(" | ")


@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
def test_tuning_has_the_tiles_that_fit_beside_the_default(name: str) -> None:
    wide = conv_tiles(ConvVariant(200704, 256, 256, 1, 3, 3, 2), TARGETS[name])
    sizes = [(tile.block_pixels, tile.block_k) for tile in wide]
    assert sizes == [(128, 128), (64, 128), (64, 64), *[(128, 256)] * (name == "sm_90")]
    assert len(conv_tiles(ConvVariant(200704, 256, 256, 1, 3, 3, 4), TARGETS["sm_80"])) == 1, "not in fp32"
    steps = [tile.block_pixels for tile in weight_grad_tiles(ConvVariant(802816, 64, 64, 1, 3, 3, 2), TARGETS[name])]
    assert steps == [64, 32]


def parts_of(conv: ConvVariant) -> tuple[int, int, float]:
    """Parts, programs, and the bytes of the parts, there and back, in units of what the contraction reads."""
    tile = weight_grad_tiles(conv, TARGETS["sm_90"])[0]
    read = conv.pixels * (conv.operands * conv.k + conv.c) * conv.itemsize
    moved = 2 * 4 * tile.parts * conv.k * conv.taps * conv.c
    return tile.parts, tile.parts * tile.pieces(conv), moved / read


# The last stages of ResNet-56 and of a pre-activation ResNet-164, and the first one of ResNet-50, batch 256.
CASES = {
    "64 x 64, 3x3, 8 x 8 pixels": ConvVariant(256 * 64, 64, 64, 1, 3, 3, 2, operands=2),
    "64 -> 256, 8 x 8 pixels": ConvVariant(256 * 64, 64, 256, 1, 1, 1, 2),
    "256 -> 64, 8 x 8 pixels": ConvVariant(256 * 64, 256, 64, 1, 1, 1, 2, operands=2),
    "16 x 16, 3x3, 32 x 32 pixels": ConvVariant(256 * 1024, 16, 16, 1, 3, 3, 2, operands=2),
    "64 x 64, 3x3, 56 x 56 pixels": ConvVariant(256 * 3136, 64, 64, 1, 3, 3, 2, operands=2),
}


@pytest.mark.parametrize("case", CASES)
def test_parts_fill_the_gpu_and_are_small_beside_the_operands(case):
    parts, programs, share = parts_of(CASES[case])
    assert parts > 1
    assert FILLING * 0.8 <= programs <= ENOUGH_TILES
    assert share <= 0.5 or programs <= FILLING


def test_where_the_activations_are_large_there_are_as_many_programs_as_two_a_multiprocessor():
    parts, programs, share = parts_of(CASES["16 x 16, 3x3, 32 x 32 pixels"])
    assert (parts, programs) == (28, 252)
    assert share < 0.03
