"""fusedres.ops.space_to_depth: images and weights of few channels, packed on kernels and off them."""

import itertools
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

import fusedres
from fusedres.operands import ConvInput, Geometry, Layer, OutputGrad, PixelBlocks
from fusedres.ops.contractions import conv_input, conv_shape
from fusedres.ops.conv_forward import conv_forward, conv_operand
from fusedres.ops.conv_weight_grad import conv_weight_grad, weight_grad
from fusedres.ops.space_to_depth import (
    blocks_of,
    depth_to_space,
    packed_sums,
    packed_weight,
    space_to_depth,
)
from tests.comparison import assert_close
from tests.kernels.convolutions import Conv
from tests.kernels.executed import TESTED, activation, executed

CASES = {
    "ResNet's stem": Conv((2, 3, 20, 26), 16, (7, 7), Geometry((2, 2), (3, 3))),
    "its stem, odd sides": Conv((1, 3, 21, 17), 16, (7, 7), Geometry((2, 2), (3, 3))),
    "EfficientNet's stem": Conv((2, 3, 12, 14), 16, (3, 3), Geometry((2, 2), (1, 1))),
    "CIFAR": Conv((2, 3, 8, 9), 16, (3, 3), Geometry(padding=(1, 1))),
    "one channel": Conv((1, 1, 7, 9), 16, (3, 3), Geometry(padding=(1, 1))),
    "seven channels, no padding": Conv((1, 7, 6, 6), 8, (2, 2)),
    "a row of more than one step": Conv((1, 1, 6, 31), 16, (3, 17), Geometry(padding=(1, 0))),
    "patches": Conv((2, 3, 12, 8), 16, (4, 4), Geometry((4, 4))),
    "patches beyond which pixels are left": Conv((1, 3, 11, 9), 16, (2, 2), Geometry((2, 2))),
    "a stride of rows alone": Conv((1, 5, 9, 6), 16, (3, 2), Geometry((3, 1), (2, 1))),
    "1x1": Conv((1, 4, 5, 6), 16, (1, 1)),
    "more padding than pixels": Conv((1, 3, 2, 2), 16, (5, 5), Geometry(padding=(4, 4))),
}
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def blocks_in(case: str) -> PixelBlocks:
    conv = CASES[case]
    blocks = blocks_of(conv.size, conv.window, conv.geometry)
    assert blocks is not None
    return blocks


def gathered(x: Tensor, blocks: PixelBlocks) -> Tensor:
    """The formula, value by value."""
    n, c, h, w = x.shape
    (bh, bw), (ph, pw) = blocks.stride, blocks.padding
    out = torch.zeros(n, *blocks.packed_size, dtype=x.dtype)
    for p, q, i, j in itertools.product(*map(range, (*out.shape[2:], bh, bw))):
        row, column = p * bh + i - ph, q * bw + j - pw
        if 0 <= row < h and 0 <= column < w:
            first = (i * bw + j) * c
            out[:, first : first + c, p, q] = x[:, :, row, column]
    return out


@pytest.mark.parametrize("case", CASES)
def test_is_the_formula(case: str) -> None:
    x, blocks = torch.randn(CASES[case].size), blocks_in(case)
    assert torch.equal(space_to_depth.reference(x, blocks, torch.float32), gathered(x, blocks))


@pytest.mark.parametrize("case", CASES)
def test_every_window_is_a_run_of_memory(case: str) -> None:
    """The convolution, as rows of the packed image and of the packed weight multiplied; and its weight's gradient."""
    conv, blocks = CASES[case], blocks_in(case)
    x, weight = torch.randn(conv.size, dtype=torch.float64), torch.randn(conv.k, conv.size[1], *conv.window).double()
    packed = space_to_depth.reference(x, blocks, torch.float64)
    p, q = blocks.output_size
    n, pitch, height, width = packed.shape
    rows = packed.permute(0, 2, 3, 1).reshape(n, height, width * pitch)
    runs = rows.unfold(2, blocks.run, pitch)[:, :, :q].unfold(1, blocks.rows, 1).transpose(3, 4)
    assert runs.shape == (n, p, q, blocks.rows, blocks.run), "no run leaves its row"
    w = packed_weight.reference(weight, blocks)[:, :, 0]
    y = torch.einsum("npqre,kre->nkpq", runs, w)
    assert_close(y, conv2d(x, weight, None, *conv.geometry), 1e-12)

    dy = torch.randn_like(y)
    sums = [torch.einsum("nkpq,npqre->kre", dy, runs), dy.sum((0, 2, 3)), runs.sum((0, 1, 2))]
    found = packed_sums(torch.cat([part.flatten() for part in sums]), conv.k, blocks, sum_dy=True, sum_u=True)
    size = conv.size[1] * conv.window[0] * conv.window[1]
    dw, sum_dy, sum_u = found.split([conv.k * size, conv.k, size])
    image = weight_grad(dy, x, conv.window, conv.geometry)
    assert_close(dw.view(conv.k, *conv.window, -1).permute(0, 3, 1, 2), image, 1e-12)
    assert torch.equal(sum_dy, sums[1])
    ones = weight_grad(torch.ones_like(dy[:, :1]), x, conv.window, conv.geometry)[0]
    assert_close(sum_u.view(*conv.window, -1).permute(2, 0, 1), ones, 1e-12)
    alone = packed_sums(sums[0].flatten(), conv.k, blocks, sum_dy=False, sum_u=False)
    assert torch.equal(alone, dw)


@pytest.mark.parametrize("case", CASES)
def test_a_packed_image_is_as_good_as_the_image(case: str) -> None:
    conv, blocks = CASES[case], blocks_in(case)
    x, weight = torch.randn(conv.size, dtype=torch.float64), torch.randn(conv.k, conv.size[1], *conv.window).double()
    u = ConvInput(space_to_depth.reference(x, blocks, x.dtype), blocks=blocks)
    assert u.size == conv.size
    exact = conv2d(x, weight, None, *conv.geometry)
    assert_close(conv2d(depth_to_space(u), weight, None, *conv.geometry), exact, 1e-12)
    assert torch.equal(conv_operand(u), depth_to_space(u))
    with fusedres.backend("reference"):
        assert_close(conv_forward(u, weight, conv.geometry)[0], exact, 1e-12)


@pytest.mark.parametrize("target", TESTED)
@pytest.mark.parametrize("case", CASES)
def test_kernels_give_the_same_bits(case: str, target: str) -> None:
    conv, blocks, place = CASES[case], blocks_in(case), list(CASES).index(case)
    source, dtype = (
        (torch.float32, torch.bfloat16, torch.float16)[place % 3],
        (torch.bfloat16, torch.float32)[place % 2],
    )
    x = torch.randn(conv.size).to(source).contiguous(memory_format=LAYOUTS[place % 2])
    packed, trace = executed(target, lambda: space_to_depth(x, blocks, dtype))
    assert trace.by_kernel() == {"space_to_depth_kernel": 1}
    assert packed.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(packed, space_to_depth.reference(x, blocks, dtype))
    weight = conv.weight(dtype)
    w, _ = executed(target, lambda: packed_weight(weight, blocks))
    assert torch.equal(w, packed_weight.reference(weight, blocks))


def test_of_views_and_batches_in_one_image() -> None:
    conv, blocks = CASES["CIFAR"], blocks_in("CIFAR")
    wide = torch.randn(2, 5, 9, 12)
    for x in (wide[:, 1:4, 1:, 2:11], wide[:1, 1:4, :8, :9].expand(2, -1, -1, -1)):
        packed, _ = executed("sm_80", lambda: space_to_depth(x, blocks, torch.bfloat16))  # noqa: B023
        assert torch.equal(packed, space_to_depth.reference(x, blocks, torch.bfloat16))
    assert conv.size == (2, 3, 8, 9)


@pytest.mark.parametrize(
    ("size", "window", "geometry"),
    [
        ((1, 8, 9, 9), (3, 3), Geometry()),
        ((1, 4, 9, 9), (3, 3), Geometry(groups=2)),
        ((1, 3, 9, 9), (3, 3), Geometry(dilation=(2, 1))),
        ((1, 3, 9, 9), (1, 1), Geometry((2, 2))),
    ],
    ids=["enough channels", "groups", "dilated", "steps over pixels"],
)
def test_what_is_not_packed(size: tuple[int, ...], window: tuple[int, int], geometry: Geometry) -> None:
    assert blocks_of(size, window, geometry) is None
    layer = Layer(torch.empty(8, size[1] // geometry.groups, *window), geometry)
    assert conv_input(torch.empty(size), torch.bfloat16, layer, pack=True).blocks is None


def test_loads_are_of_8_bytes_and_steps_whole() -> None:
    for case, conv in CASES.items():
        blocks = blocks_in(case)
        shape = conv_shape(ConvInput(activation(conv.size, torch.bfloat16)), conv.weight(torch.bfloat16), conv.geometry)
        assert blocks.pitch % 4 == 0 and blocks.run % 16 == 0
        assert (shape.c, shape.r, shape.s) == (blocks.run, blocks.rows, 1)
    stem = blocks_of((256, 3, 224, 224), (7, 7), Geometry((2, 2), (3, 3)))
    assert stem is not None
    assert (stem.pitch, stem.rows, stem.run, stem.packed_size) == (12, 4, 64, (12, 115, 117))


@pytest.mark.parametrize("packs", [True, False])
def test_the_plan_says_who_convolves_few_channels(packs: bool) -> None:
    image, weight = (torch.empty(size, device="meta", dtype=torch.bfloat16) for size in ((2, 3, 9, 9), (16, 3, 3, 3)))
    layer = Layer(weight, Geometry(padding=(1, 1)))
    dy = OutputGrad(image.new_empty(2, 16, 9, 9), p=torch.empty(16, device="meta"))
    with fusedres.record() as trace, patch("fusedres.ops.contractions.packs_pixels", return_value=packs):
        u = conv_input(image, torch.bfloat16, layer, pack=True)
        assert (u.blocks is not None) is packs
        y, partials = conv_forward(u, weight, layer.geometry, statistics=True)
        dw = conv_weight_grad(dy, u, (3, 3), layer.geometry)
    assert (y.shape, dw.shape) == ((2, 16, 9, 9), weight.shape)
    assert partials is not None
    names = set(trace.by_kernel())
    assert names.isdisjoint({"conv_forward_kernel", "conv_weight_grad_kernel"}) is not packs
