"""fusedres.plan.conv_tiles: what it chooses fits into the registers of its target, and into how many parts it cuts."""

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch

import fusedres
from fusedres.compiler.budgets import violations
from fusedres.compiler.figures import read_figures
from fusedres.compiler.known import compile_binary
from fusedres.compiler.targets import TARGETS
from fusedres.operands import ConvInput, Geometry, OutputGrad, PoolGeometry
from fusedres.ops.conv_backward import conv_producer_backward
from fusedres.ops.conv_weight_grad import conv_weight_grad
from fusedres.ops.stem_contractions import output_contraction, pooled_contraction
from fusedres.plan.conv_tiles import conv_tiles, pinned, weight_grad_tiles
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
    with fusedres.record(target) as trace, fusedres.backend("triton"):
        call()
    assert any(launch.name.startswith("conv_") for launch in trace.launches)
    for launch in trace.launches:
        assert violations(launch.binary, target, read_figures(compile_binary(launch.binary, target), target)) == []


PLAIN, FORMED = {"sm_80 128": 0.45, "sm_90 128": 0.55, "sm_90 256": 0.3}, {
    "sm_80 128": 0.7, "sm_90 128": 1.12, "sm_90 256": 0.6,  # of sm_90 in 128 registers, so that two blocks fit
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
    tile = next(tile for tile in tiles if tile.block_k == int(width))
    with fusedres.record(target) as trace, fusedres.backend("triton"), pinned(tile):
        forward((256, 256, 28, 28), 256, window, dtype, formed=prologue)
    (launch,) = trace.launches
    figures = read_figures(compile_binary(launch.binary, target), target)
    broken = violations(launch.binary, target, figures)
    # The widest is for tuning alone: ptxas of Triton 3.8 lets its wgmma wait.
    assert broken == [] or (width == "256" and len(broken) == 1 and "C7514" in broken[0])
    assert figures.issue is not None
    what = f"{which}, {'formed' if prologue else 'plain'}, {window}x{window}"
    assert figures.issue <= held_to((FORMED if prologue else PLAIN)[which], what)


# Of 1x1 and 3x3: what is formed of the operands, and the cycles above. Forming takes what is left of them.
WEIGHT_GRADS = {
    ("sm_80", "u"): (0.75, 0.8), ("sm_80", "dy"): (0.85, 1.05), ("sm_80", "both"): (1.2, 1.25),
    ("sm_80", "both, bits"): (1.3, 1.35), ("sm_90", "u"): (0.7, 1.1), ("sm_90", "dy"): (1.6, 2.0),
    ("sm_90", "both"): (1.8, 2.1), ("sm_90", "both, bits"): (2.15, 2.45),
}  # fmt: skip


@pytest.mark.parametrize("window", [1, 3], ids=["1x1", "3x3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("target", "form"), WEIGHT_GRADS)
def test_the_loop_over_pixels_is_not_spent_on_addresses(
    target: str, form: str, dtype: torch.dtype, window: int
) -> None:
    what = {"formed": form != "u", "input_formed": form != "dy", "mask": "bits" in form}
    with fusedres.record(target) as trace, fusedres.backend("triton"):
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
        rule = patch("fusedres.ops.conv_backward.writing_pays", return_value=written)
        with fusedres.record(target) as trace, fusedres.backend("triton"), rule:
            conv_producer_backward(dy, u, on_meta(channels, channels, 3, 3, dtype=dtype), geometry, producer)
        assert ("bn_backward_apply_kernel" in trace.by_kernel()) is written
        seconds.append(0.0)
        for launch in trace.launches:
            issue = read_figures(compile_binary(launch.binary, target), target).issue
            moving = (launch.bytes_read + launch.bytes_written) / gpu.bandwidth
            seconds[-1] += max(moving, launch.flops / gpu.rate(dtype) * max(1.0, issue or 0.0))
    assert seconds[1] < 0.9 * seconds[0]


@pytest.mark.parametrize(("target", "bars"), [("sm_80", (1.1, 3.7)), ("sm_90", (1.85, 4.3))])
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
        ConvVariant(3211264, 64, 64, 1, 4, 1, 2),
        "128x64x64 4 3 | 128x64x64 4 4 | 128x64x64 4 4 | 128x64x64 4 2 | 64x64x64 4 2 | 64x64x64 4 2",
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
# Pixels of a step, channels of output and input, taps if they share one; warps and parts.
CHOSEN_FOR_WEIGHTS = {
    "1x1": (
        ConvVariant(200704, 128, 512, 1, 1, 1, 2),
        "32x128x128 8 27 | 64x128x128 8 33 | 64x128x128 8 37 | 32x128x128 8 42 | 32x128x128 8 76 | 32x64x64 4 12",
    ),
    "1x1, dy formed": (
        ConvVariant(200704, 512, 128, 1, 1, 1, 2, operands=2),
        "32x128x128 8 27 | 64x128x128 8 33 | 32x128x128 8 37 | 32x128x128 8 42 | 32x128x128 8 76 | 32x64x64 4 12",
    ),
    "3x3 of 64 channels": (
        ConvVariant(802816, 64, 64, 1, 3, 3, 2),
        "64x64x64 4 24 | 64x64x64*3 4 88 | 64x64x64 4 32 | 64x64x64 4 37 | 64x64x64 4 67 | 64x64x64 4 21",
    ),
    "3x3 of 128 channels, dy copied": (
        ConvVariant(200704, 128, 128, 1, 3, 3, 2, copied=True),
        "32x128x128 8 12 | 64x64x128*3 8 22 | 64x128x128 8 16 | 32x128x128 8 18 | 32x128x128 8 33 | 64x64x64 4 16",
    ),
    "3x3 in fp32": (
        ConvVariant(200704, 128, 128, 1, 3, 3, 4, operands=2),
        "16x128x64 8 6 | 16x128x64 8 22 | 16x128x64 8 8 | 16x128x64 8 28 | 32x128x128 8 33 | 16x32x64 4 8",
    ),
    "a stem": (
        ConvVariant(3211264, 64, 64, 1, 4, 1, 2),
        "64x64x64*2 4 108 | 64x64x64*4 8 132 | 64x64x64*4 8 148 | 64x64x64*2 4 170 | 64x64x64 4 152 | 32x64x64 4 48",
    ),
    "a stem in fp32": (
        ConvVariant(3211264, 64, 64, 1, 4, 1, 4),
        "16x64x64 4 54 | 16x64x64 4 66 | 16x64x64 4 74 | 16x64x64 4 85 | 32x64x64 4 152 | 16x32x64 4 24",
    ),
    "groups of 8 channels": (
        ConvVariant(200704, 8, 8, 32, 3, 3, 2, operands=2),
        "32x64x64 4 6 | 64x64x64 4 22 | 32x64x64 4 8 | 32x64x64 4 28 | 32x64x64 4 33 | 32x64x64 4 16",
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
    shared = [f"*{t.taps}" * (t.taps > 1) for t in found]
    words = [
        f"{t.block_pixels}x{t.block_k}x{t.block_c}{taps} {t.num_warps} {t.parts}"
        for t, taps in zip(found, shared, strict=True)
    ]
    assert words == tiles.split(" | ")


@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
def test_tuning_has_the_tiles_that_fit_beside_the_default(name: str) -> None:
    wide = conv_tiles(ConvVariant(200704, 256, 256, 1, 3, 3, 2), TARGETS[name])
    sizes = [(tile.block_pixels, tile.block_k) for tile in wide]
    assert sizes == [(128, 128), (64, 128), (64, 64), *[(128, 256)] * (name == "sm_90")]
    assert len(conv_tiles(ConvVariant(200704, 256, 256, 1, 3, 3, 4), TARGETS["sm_80"])) == 1, "not in fp32"
    steps = [tile.block_pixels for tile in weight_grad_tiles(ConvVariant(802816, 64, 64, 1, 3, 3, 2), TARGETS[name])]
    assert steps == [64, 32]


# The last stages of ResNet-56 and of a pre-activation ResNet-164, and the layers of ResNet-50, batch 256.
CASES = {
    "64 x 64, 3x3, 8 x 8 pixels": ConvVariant(256 * 64, 64, 64, 1, 3, 3, 2, operands=2),
    "64 -> 256, 8 x 8 pixels": ConvVariant(256 * 64, 64, 256, 1, 1, 1, 2),
    "256 -> 64, 8 x 8 pixels": ConvVariant(256 * 64, 256, 64, 1, 1, 1, 2, operands=2),
    "16 x 16, 3x3, 32 x 32 pixels": ConvVariant(256 * 1024, 16, 16, 1, 3, 3, 2, operands=2),
    **{
        f"{c} -> {k}, {window}x{window}": ConvVariant(256 * side**2, c, k, 1, window, window, 2, operands=2)
        for side, width in ((56, 64), (28, 128), (14, 256), (7, 512))
        for c, k, window in ((width, width, 3), (4 * width, width, 1), (width, 4 * width, 1))
    },
}
DEVICES = {"A100": TARGETS["sm_80"], "A30": TARGETS["sm_80"]._replace(multiprocessors=56), "H100": TARGETS["sm_90"],
           "H100 PCIe": TARGETS["sm_90"]._replace(multiprocessors=114)}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_parts_fill_the_multiprocessors_in_whole_waves(case: str, device: str) -> None:
    conv, target = CASES[case], DEVICES[device]
    (tile, *_) = weight_grad_tiles(conv, target)
    programs, wave = tile.parts * tile.pieces(conv), target.multiprocessors * tile.side_by_side(conv, target)
    if conv.pixels < 2**15:  # so few that more parts would be nothing but their sums
        assert programs >= 0.7 * target.multiprocessors
    else:
        assert programs >= 0.85 * -(-programs // wave) * wave
    operand = conv.pixels * min(conv.c, conv.k) * conv.itemsize
    assert tile.parts == 1 or 4 * tile.parts * conv.k * conv.taps * conv.c <= operand, "sums take more memory than it"


def test_one_part_more_is_worth_its_sums_or_is_not_made() -> None:
    """Of a layer whose weight is large beside its activations: none of so few pixels."""
    conv = ConvVariant(64 * 49, 512, 512, 1, 3, 3, 2)
    few, many = (weight_grad_tiles(conv._replace(pixels=n * 49), TARGETS["sm_90"])[0].parts for n in (8, 2048))
    assert few == 1 < many
