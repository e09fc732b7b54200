"""fusedres.kernels.conv_weight_grad, compiled and executed: both operands given, or formed on load."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fusedres
from fusedres.compiler.targets import Target
from fusedres.operands import ConvInput, Geometry, OutputGrad
from fusedres.ops.act_mask import is_bits, pack_relu_mask
from fusedres.ops.bn_backward import bn_backward_apply
from fusedres.ops.conv_forward import conv_operand
from fusedres.ops.conv_weight_grad import conv_weight_grad, summed_weight_grad, weight_grad
from fusedres.plan.conv_tiles import WeightGradTile, weight_grad_tiles
from fusedres.plan.shapes import ConvVariant
from fusedres.plan.tiles import listed
from tests.comparison import LOW, assert_close
from tests.kernels import random_convolutions
from tests.kernels.convolutions import NETWORKS, Conv, as_tf32, assert_as_accurate, convolutions_of
from tests.kernels.executed import TESTED, activation, covering, executed
from tests.kernels.on_device import emulated_only
from tests.kernels.random_convolutions import reproducible

CASES = {
    "1x1": Conv((1, 64, 9, 9), 128, (1, 1)),
    "strided 1x1": Conv((2, 64, 7, 8), 64, (1, 1), Geometry((2, 2))),
    "3x3": Conv((2, 64, 7, 9), 64, (3, 3), Geometry(padding=(1, 1))),
    "strided 3x3, tails of pixels, K and C": Conv((1, 40, 9, 7), 24, (3, 3), Geometry((2, 2), (1, 1))),
    "odd channels": Conv((1, 33, 5, 5), 17, (3, 3), Geometry(padding=(1, 1))),
    "dilated": Conv((1, 32, 9, 9), 16, (3, 3), Geometry(padding=(2, 2), dilation=(2, 2))),
    "a window wider than high": Conv((1, 16, 6, 9), 16, (1, 5), Geometry(padding=(0, 2))),
    "wide": Conv((1, 192, 5, 5), 256, (1, 1)),
    "the stem": Conv((1, 3, 21, 18), 64, (7, 7), Geometry((2, 2), (3, 3))),
    "one channel": Conv((1, 1, 8, 8), 16, (3, 3), Geometry(padding=(1, 1))),
    "one pixel": Conv((1, 16, 1, 1), 16, (1, 1)),
    "padded 1x1": Conv((1, 16, 4, 4), 24, (1, 1), Geometry(padding=(1, 1))),
    "no padding": Conv((1, 16, 7, 6), 80, (3, 3)),
    "groups of 4": Conv((1, 128, 6, 6), 128, (3, 3), Geometry(padding=(1, 1), groups=32)),
    "two wide groups": Conv((1, 64, 6, 6), 128, (3, 3), Geometry(padding=(1, 1), groups=2)),
    "groups that widen": Conv((1, 8, 6, 6), 64, (3, 3), Geometry(padding=(1, 1), groups=4)),
}
FORMS = ("dy and u", "bits, dy and u formed", "output, dy formed", "masked g", "u formed", "scaled g", "pooled, bits")


def operands(conv: Conv, dtype: torch.dtype, form: str) -> tuple[OutputGrad, ConvInput]:
    p, q = conv.geometry.output_size(*conv.size[2:], conv.window)
    size = (conv.size[0], conv.k, p, q)
    z = torch.relu(activation(size, dtype))
    dy = OutputGrad(activation(size, dtype))
    if form.startswith("pooled"):
        dy = OutputGrad(activation((*size[:2], 1, 1), dtype).expand(size))
    if form.startswith(("bits", "masked", "pooled")):
        dy = dy._replace(mask=pack_relu_mask(z))
    if form.startswith("output"):
        dy = dy._replace(mask=z)
    if "dy formed" in form or "dy and u formed" in form:
        p_, q_, r_, mean = torch.randn(4, conv.k)
        dy = dy._replace(y=activation(size, dtype), p=p_, q=q_, r=r_, mean=mean)
    if form.startswith("scaled"):
        dy = dy._replace(p=torch.randn(conv.k))
    numbers = (None, None)
    if "u formed" in form:
        numbers = (torch.rand(conv.size[1]) + 0.5, torch.randn(conv.size[1]))
    return dy, ConvInput(conv.input(dtype), *numbers)


def check(target: str, conv: Conv, dtype: torch.dtype, form: str) -> None:
    dy, u = operands(conv, dtype, form)
    dw, trace = executed(target, lambda: conv_weight_grad(dy, u, conv.window, conv.geometry))
    assert trace.by_kernel()["conv_weight_grad_kernel"] == 1
    assert dw.shape == (conv.k, conv.size[1] // conv.geometry.groups, *conv.window)
    assert dw.dtype == torch.float32

    def computed(dtype: torch.dtype, *, tf32: bool = False) -> Tensor:
        def to(tensor: Tensor | None) -> Tensor | None:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            vector = tensor is not None and tensor.dim() == 1
            return tensor if tensor is None or is_bits(tensor) else tensor.to(wide if vector else dtype)

        grad = bn_backward_apply.reference(OutputGrad(*(to(part) for part in dy[:7])))
        source = conv_operand(ConvInput(to(u.tensor), to(u.scale), to(u.shift)))
        if tf32:
            grad, source = as_tf32(grad.float()).double(), as_tf32(source.float()).double()
        return weight_grad(grad, source, conv.window, conv.geometry)

    tf32 = None
    if dtype == torch.float32 and torch.backends.cudnn.allow_tf32 and target.startswith("sm"):
        tf32 = computed(torch.float64, tf32=True)
    pixels = dy.g[:, 0].numel()
    assert_as_accurate(dw, computed(dtype).float(), computed(torch.float64), tf32, pixels)


@pytest.mark.parametrize(("case", "target", "dtype"), covering(CASES, contraction=True))
def test_agrees(case: str, target: str, dtype: torch.dtype) -> None:
    check(target, CASES[case], dtype, "dy and u")


@pytest.mark.parametrize(("form", "target", "dtype"), covering(FORMS[1:], offset=2, contraction=True))
def test_every_form(form: str, target: str, dtype: torch.dtype) -> None:
    check(target, CASES["strided 3x3, tails of pixels, K and C"], dtype, form)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("form", "target", "dtype"), covering(FORMS[1:3], contraction=True))
def test_every_form_of_every_case(case: str, form: str, target: str, dtype: torch.dtype) -> None:
    check(target, CASES[case], dtype, form)


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("target", TESTED)
def test_every_shape_of_every_network(network: str, target: str) -> None:
    for i, conv in enumerate(convolutions_of(network)):
        check(target, conv.smaller(8_000_000), LOW[i % 2], FORMS[i % 2])


@pytest.mark.parametrize(
    ("case", "target", "dtype"), covering(["3x3", "groups of 4", "the stem"], offset=4, contraction=True)
)
def test_several_parts(case: str, target: str, dtype: torch.dtype) -> None:
    conv = CASES[case]
    conv = conv._replace(size=(3, *conv.size[1:]))

    def in_parts(shape: ConvVariant, on: Target) -> tuple[WeightGradTile, ...]:
        tiles = weight_grad_tiles(shape, on)
        return tuple(replace(tile, parts=tile.filled_parts(shape.pixels, 4)) for tile in tiles)

    with patch("fusedres.plan.conv_tiles.weight_grad_tiles", in_parts):
        check(target, conv, dtype, "dy and u")


SHARING = {
    "3x3": "u formed",
    "strided 3x3, tails of pixels, K and C": "u formed",
    "odd channels": "dy and u",
    "dilated": "u formed",
    "no padding": "masked g",
    "the stem": "output, dy formed",
}


@pytest.mark.parametrize("target", TESTED)
@pytest.mark.parametrize("case", SHARING)
def test_taps_share_what_is_formed_once(case: str, target: str) -> None:
    conv, together = CASES[case], 2 if case == "the stem" else 3

    def shared(shape: ConvVariant, on: Target) -> tuple[WeightGradTile, ...]:
        tile = weight_grad_tiles(shape, on)[0]
        narrow = replace(tile, block_k=16, block_c=16, block_pixels=16, num_warps=4, taps=together)
        return (narrow, replace(narrow, parts=narrow.filled_parts(shape.pixels, 3)))

    with patch("fusedres.plan.conv_tiles.weight_grad_tiles", shared):
        for place in (0, 1):
            with listed(place):
                check(target, conv, LOW[place], SHARING[case])


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("form", ["dy and u", "u formed", "bits, dy and u formed"])
@pytest.mark.parametrize("case", ["3x3", "strided 3x3, tails of pixels, K and C", "odd channels", "wide 3x3"])
def test_the_taps_of_a_row_on_hopper(case: str, form: str, dtype: torch.dtype) -> None:
    conv = {**CASES, "wide 3x3": Conv((1, 136, 9, 8), 72, (3, 3), Geometry(padding=(1, 1)))}[case]
    check("sm_90", conv, dtype, form)


@pytest.mark.parametrize("target", TESTED)
@pytest.mark.parametrize("case", ["1x1", "3x3", "the stem"])
def test_sums_of_operands_that_nothing_is_formed_of(case: str, target: str) -> None:
    """What is both summed and multiplied is not overwritten in shared memory before both are done."""
    conv = CASES[case]._replace(size=(2, *CASES[case].size[1:]))
    dy, u = operands(conv, LOW[0], "dy and u")
    sums, _ = executed(target, lambda: summed_weight_grad(dy, u, conv.window, conv.geometry, sum_dy=True, sum_u=True))
    assert_close(sums.sum_dy, dy.g.double().sum((0, 2, 3)), 1e-5)
    ones = torch.ones_like(dy.g[:, :1]).double()
    assert_close(sums.sum_u, weight_grad(ones, u.tensor.double(), conv.window, conv.geometry)[0], 1e-5)
    assert_close(sums.dw, weight_grad(dy.g.double(), u.tensor.double(), conv.window, conv.geometry), 1e-5)


@emulated_only
def test_groups_that_no_tile_holds_have_no_kernel() -> None:
    conv = Conv((1, 30, 6, 6), 60, (3, 3), Geometry(padding=(1, 1), groups=5))
    dy, u = operands(conv, torch.float32, "dy and u")
    with fusedres.backend("vgpu:sm_90"), fusedres.record() as trace:
        dw = conv_weight_grad(dy, u, conv.window, conv.geometry)
    assert not trace.launches
    assert_close(dw, weight_grad(dy.g.double(), u.tensor.double(), conv.window, conv.geometry), 1e-5)


RANDOM = {**random_convolutions.ON_TARGETS, "form": st.sampled_from(FORMS)}


@settings(reproducible, max_examples=4)
@given(**RANDOM)
def test_random_shapes(conv: Conv, target: str, dtype: torch.dtype, form: str) -> None:
    check(target, conv, dtype, form)


@pytest.mark.slow
@settings(reproducible, max_examples=300)
@given(**RANDOM)
def test_many_random_shapes(conv: Conv, target: str, dtype: torch.dtype, form: str) -> None:
    check(target, conv, dtype, form)
