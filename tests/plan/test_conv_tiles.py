"""fusedres.plan.conv_tiles: what it chooses fits into the registers of its target, and into how many parts it cuts."""

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import fusedres
from fusedres.binaries import read_figures, violations
from fusedres.offline import TARGETS, compile_binary
from fusedres.ops.contract import ConvInput, Geometry, Normaliser, OutputGrad, PoolGeometry
from fusedres.ops.contractions import conv_shape
from fusedres.ops.conv_backward import conv_producer_backward
from fusedres.ops.conv_bn_act import Contraction, conv_bn_act
from fusedres.ops.conv_forward import conv_forward
from fusedres.ops.conv_input_grad import Producer, conv_input_grad, conv_producer_grad
from fusedres.ops.conv_weight_grad import conv_weight_grad, summed_weight_grad
from fusedres.ops.relu_mask import pack_relu_mask
from fusedres.ops.stem_contractions import output_contraction, pooled_contraction
from fusedres.plan.conv_tiles import ENOUGH_TILES, FILLING, ConvShape, conv_tiles, pinned, weight_grad_tiles
from fusedres.plan.gpus import target_gpu
from tests.budgets import held_to

Size = tuple[int, int, int, int]
WINDOW = Geometry(padding=(1, 1))


def on_meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    layout = torch.channels_last if len(size) == 4 else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device="meta").contiguous(memory_format=layout)


def formed_input(size: Size, dtype: torch.dtype = torch.float32) -> ConvInput:
    return ConvInput(on_meta(*size, dtype=dtype), on_meta(size[1]), on_meta(size[1]))


def bits(size: Size) -> Tensor:
    return pack_relu_mask(on_meta(*size))


def formed_gradient(size: Size, dtype: torch.dtype = torch.float32, mask: Tensor | None = None) -> OutputGrad:
    p, q, r, mean = (on_meta(size[1]) for _ in range(4))
    return OutputGrad(on_meta(*size, dtype=dtype), mask, on_meta(*size, dtype=dtype), p, q, r, mean)


def weight_grad_of_moments() -> None:
    size = (64, 256, 14, 14)
    summed_weight_grad(OutputGrad(on_meta(*size), bits(size)), formed_input((64, 128, 14, 14)), (1, 1), Geometry())


def weight_grad_of_a_window() -> None:
    conv_weight_grad(formed_gradient((64, 128, 14, 14)), formed_input((64, 128, 14, 14)), (3, 3), WINDOW)


def weight_grad_of_few_channels() -> None:
    dy = OutputGrad(on_meta(64, 32, 16, 16), None, None, on_meta(32))
    conv_weight_grad(dy, ConvInput(on_meta(64, 64, 16, 16)), (3, 3), WINDOW)


def weight_grad_of_the_stem() -> None:
    dy, u = OutputGrad(on_meta(64, 64, 112, 112)), ConvInput(on_meta(64, 3, 224, 224))
    summed_weight_grad(dy, u, (7, 7), Geometry((2, 2), (3, 3)), sum_dy=False, sum_u=True)


def weight_grad_of_a_basic_block() -> None:
    size, dtype = (64, 64, 56, 56), torch.bfloat16
    conv_weight_grad(formed_gradient(size, dtype, bits(size)), formed_input(size, dtype), (3, 3), WINDOW)


def block_end_with_projection() -> None:
    weight, vector = on_meta(256, 64, 1, 1), on_meta(256)
    main = Contraction(formed_input((64, 64, 14, 14)), weight, Geometry(), vector, vector)
    conv_bn_act(main, second=main._replace(u=ConvInput(on_meta(64, 64, 14, 14))), bit_mask=True)


def preactivation_with_projection() -> None:
    dtype, vector = torch.bfloat16, on_meta(256)
    main = Contraction(
        formed_input((256, 64, 16, 16), dtype), on_meta(256, 64, 1, 1, dtype=dtype), Geometry(), vector, vector
    )
    conv_bn_act(main, second=main._replace(u=formed_input((256, 64, 16, 16), dtype)), act=None, statistics=True)


def preactivation_with_a_narrow_projection() -> None:
    dtype = torch.bfloat16
    main = Contraction(formed_input((256, 16, 32, 32), dtype), on_meta(64, 16, 1, 1, dtype=dtype), Geometry())
    second = main._replace(u=ConvInput(on_meta(256, 16, 32, 32, dtype=dtype)))
    conv_bn_act(main, second=second, act=None, statistics=True)


def window_of_a_narrow_network() -> None:
    dtype = torch.bfloat16
    u, weight = ConvInput(on_meta(256, 32, 16, 16, dtype=dtype)), on_meta(64, 32, 3, 3, dtype=dtype)
    conv_forward(u, weight, Geometry((2, 2), (1, 1)), statistics=True)


def pointwise_that_narrows() -> None:
    dtype = torch.bfloat16
    conv_forward(
        formed_input((256, 64, 32, 32), dtype), on_meta(16, 64, 1, 1, dtype=dtype), Geometry(), statistics=True
    )


def input_grad_of_a_preactivation() -> None:
    """Joined to the shortcut's gradient and then to the producer's ReLU."""
    size, vector = (256, 256, 16, 16), on_meta(256)
    producer = Producer(on_meta(*size), Normaliser(vector, vector, vector, vector))
    dy = formed_gradient((256, 128, 16, 16))
    conv_producer_grad(dy, on_meta(128, 256, 1, 1), Geometry(), producer, add=OutputGrad(on_meta(*size)))


def input_grad_of_a_projection() -> None:
    size = (64, 256, 14, 14)
    conv_input_grad(
        formed_gradient(size, mask=bits(size)), on_meta(256, 128, 1, 1), (64, 128, 28, 28), Geometry((2, 2))
    )


def input_grad_of_groups() -> None:
    """Of a strided 3x3 convolution of ResNeXt-50 behind its producer's ReLU."""
    dtype, vector = torch.bfloat16, on_meta(512)
    producer = Producer(on_meta(64, 512, 28, 28, dtype=dtype), Normaliser(vector, vector, vector, vector))
    geometry = Geometry((2, 2), (1, 1), groups=32)
    conv_producer_grad(
        formed_gradient((64, 512, 14, 14), dtype), on_meta(512, 16, 3, 3, dtype=dtype), geometry, producer
    )


def input_grad_of_a_formed_gradient() -> None:
    dtype = torch.float16
    conv_input_grad(
        formed_gradient((256, 256, 14, 14), dtype), on_meta(256, 128, 1, 1, dtype=dtype), (256, 128, 14, 14), Geometry()
    )


def input_grad_in_fp32() -> None:
    conv_input_grad(formed_gradient((256, 128, 28, 28)), on_meta(128, 64, 1, 1), (256, 64, 28, 28), Geometry())


def weight_grad_of_a_window_with_bits() -> None:
    size, dtype = (256, 64, 8, 8), torch.bfloat16
    conv_weight_grad(formed_gradient(size, dtype, bits(size)), formed_input(size, dtype), (3, 3), WINDOW)


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
    x = on_meta(256, 256, 28, 28, dtype=dtype)
    u = formed_input((256, 256, 28, 28), dtype) if prologue else ConvInput(x)
    weight, geometry = on_meta(256, 256, window, window, dtype=dtype), Geometry(padding=(window // 2, window // 2))
    tiles = conv_tiles(conv_shape(u, weight, geometry), TARGETS[target])
    with fusedres.record(target) as trace, pinned(next(tile for tile in tiles if tile.block_k == int(width))):
        conv_forward(u, weight, geometry, statistics=True)
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
    size = (256, 256, 14, 14)
    x = on_meta(*size, dtype=dtype)
    u = ConvInput(x) if form == "dy" else formed_input(size, dtype)
    dy = OutputGrad(x) if form == "u" else formed_gradient(size, dtype, bits(size) if "bits" in form else None)
    with fusedres.record(target) as trace:
        conv_weight_grad(dy, u, (window, window), Geometry(padding=(window // 2, window // 2)))
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
    u, dy, geometry = formed_input(size, dtype), formed_gradient(size, dtype), Geometry(padding=(1, 1))
    producer = Producer(u.tensor, Normaliser(*(on_meta(channels) for _ in range(4))))
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


def parts_of(shape: ConvShape) -> tuple[int, int, float]:
    """Parts, programs, and the bytes of the parts, there and back, in units of what the contraction reads."""
    tile = weight_grad_tiles(shape, TARGETS["sm_90"])[0]
    read = shape.pixels * (shape.operands * shape.k + shape.c) * shape.itemsize
    moved = 2 * 4 * tile.parts * shape.k * shape.r * shape.s * shape.c
    return tile.parts, tile.parts * tile.tiles(shape), moved / read


# The last stages of ResNet-56 and of a pre-activation ResNet-164, and the first one of ResNet-50, batch 256.
CASES = {
    "64 x 64, 3x3, 8 x 8 pixels": ConvShape(256 * 64, 64, 64, 1, 3, 3, 2, operands=2),
    "64 -> 256, 8 x 8 pixels": ConvShape(256 * 64, 64, 256, 1, 1, 1, 2),
    "256 -> 64, 8 x 8 pixels": ConvShape(256 * 64, 256, 64, 1, 1, 1, 2, operands=2),
    "16 x 16, 3x3, 32 x 32 pixels": ConvShape(256 * 1024, 16, 16, 1, 3, 3, 2, operands=2),
    "64 x 64, 3x3, 56 x 56 pixels": ConvShape(256 * 3136, 64, 64, 1, 3, 3, 2, operands=2),
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
