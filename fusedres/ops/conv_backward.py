"""Both gradients of a convolution: by one launch where it is narrow, and by one each elsewhere.

Two launches form dy each, or read what a pass before them has written, as the plan has it.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres.operands import ConvInput, Geometry, OutputGrad, Producer, statistics_dtype
from fusedres.ops.act_mask import gradient, is_bits, is_pooled, mask_arguments
from fusedres.ops.bn_backward import (
    GRADIENT,
    Finished,
    NormSums,
    bn_backward_apply,
    finished,
    gradient_arguments,
    operands_of,
)
from fusedres.ops.checks import check_activation
from fusedres.ops.contractions import window_arguments
from fusedres.ops.conv_forward import conv_operand
from fusedres.ops.conv_input_grad import (
    ProducerGrad,
    check_gradient,
    check_producer_grad,
    conv_input_grad,
    conv_producer_grad,
    joined_by_onednn,
    takes,
    with_added,
)
from fusedres.ops.conv_weight_grad import conv_weight_grad, parts_summed, unsummed_weight_grad
from fusedres.ops.device import device_activation
from fusedres.ops.features import FeatureGrads
from fusedres.ops.input_gradients import bytes_reached, from_elsewhere, launch_input_grad, why_no_kernel, written_to
from fusedres.ops.op import Op
from fusedres.ops.rows import channels_last, pitch_of, pixels, row_layout
from fusedres.ops.zero_pad_shortcut import Added, added_geometry, added_read
from fusedres.plan.backward_tiles import BackwardTile, backward_tile, writing_pays
from fusedres.plan.shapes import ConvVariant, depthwise
from fusedres.runtime.launch import launch, target_of
from fusedres.traffic.weigh import fastest


def _check(dy: OutputGrad, u: ConvInput, weight: Tensor, geometry: Geometry, *, add: Added | None = None) -> None:
    check_activation("u", u.tensor)
    check_gradient(dy, weight, u.size, geometry)


def _conv_backward(
    dy: OutputGrad, u: ConvInput, weight: Tensor, geometry: Geometry, *, add: Added | None = None
) -> tuple[Tensor, Tensor]:
    """(dW, du): `conv_weight_grad` and `conv_input_grad`.

    Args:
        dy: (N, K, P, Q), formed on load.
        u: (N, C, H, W), formed on load.
        weight: (K, C/groups, R, S) in the dtype of u.
        geometry: that of the forward convolution.
        add: a gradient of the same input from elsewhere (the shortcut), masked on load, or None.

    Returns:
        dW (K, C/groups, R, S) in the statistics dtype, and du (N, C, H, W) as `conv_input_grad` gives it.
    """
    kernel = (weight.shape[2], weight.shape[3])
    dweight = conv_weight_grad(dy, u, kernel, geometry)
    return dweight, conv_input_grad(dy, weight, u.size, geometry, add=add)


conv_backward = Op(_conv_backward, check=_check)


@conv_backward.triton
def _conv_backward_triton(
    dy: OutputGrad, u: ConvInput, weight: Tensor, geometry: Geometry, *, add: Added | None = None
) -> tuple[Tensor, Tensor]:
    ways: dict[str, Any] = {"joint": _jointly, "apart": _conv_backward, "written": _written}
    if dy.p is None and dy.mask is None and u.scale is None and add is None:
        ways["library"] = _conv_backward_native  # nothing to join: both in one call
    rule = _rule(dy, weight, geometry, _narrow(dy, u, weight, geometry, add, producer=False), "library" in ways)
    way = fastest("conv_backward", {rule: ways[rule], **ways}, dy, u, weight, geometry, add=add)
    return NotImplemented if way == "library" else ways[way](dy, u, weight, geometry, add=add)


def _rule(dy: OutputGrad, weight: Tensor, geometry: Geometry, narrow: object, library: bool = False) -> str:
    """The way that is taken where no times are predicted."""
    if narrow is not None:
        return "joint"
    return "library" if library else "written" if _writing_pays(dy, weight, geometry) else "apart"


def _jointly(
    dy: OutputGrad, u: ConvInput, weight: Tensor, geometry: Geometry, *, add: Added | None = None
) -> tuple[Tensor, Tensor]:
    """By one launch, where a tile fits."""
    narrow = _narrow(dy, u, weight, geometry, add, producer=False, weighed=False)
    if narrow is None:
        return NotImplemented
    launched = _launched(dy, u, weight, geometry, *narrow, add=add)
    return launched.dw, launched.du


def _written(
    dy: OutputGrad, u: ConvInput, weight: Tensor, geometry: Geometry, *, add: Added | None = None
) -> tuple[Tensor, Tensor]:
    """By two, after dy has been written to memory, if it has parts."""
    if dy.q is None:
        return NotImplemented
    return _conv_backward(OutputGrad(bn_backward_apply(dy)), u, weight, geometry, add=add)


@conv_backward.native
def _conv_backward_native(
    dy: OutputGrad, u: ConvInput, weight: Tensor, geometry: Geometry, *, add: Added | None = None
) -> tuple[Tensor, Tensor]:
    if isinstance(add, OutputGrad) and joined_by_onednn(weight, geometry, add):
        return NotImplemented
    stride, padding, dilation, groups = geometry
    du, dweight, _ = torch.ops.aten.convolution_backward(
        bn_backward_apply(dy), conv_operand(u), weight, None, stride, padding, dilation, False, (0, 0), groups,
        (True, True, False),
    )  # fmt: skip
    return dweight.to(statistics_dtype(dweight.dtype)), with_added(du, add)


def _check_producer_backward(
    dy: OutputGrad, u: ConvInput, weight: Tensor, geometry: Geometry, producer: Producer, *, add: Added | None = None,
    features: FeatureGrads | None = None,
) -> None:  # fmt: skip
    check_producer_grad(dy, weight, geometry, producer, add=add, features=features)


def _conv_producer_backward(
    dy: OutputGrad,
    u: ConvInput,
    weight: Tensor,
    geometry: Geometry,
    producer: Producer,
    *,
    add: Added | None = None,
    features: FeatureGrads | None = None,
) -> tuple[Tensor, ProducerGrad]:
    """(dW, du): `conv_weight_grad` and `conv_producer_grad`, u being what the producer put out; arguments as there."""
    dweight = conv_weight_grad(dy, u, (weight.shape[2], weight.shape[3]), geometry)
    return dweight, conv_producer_grad(dy, weight, geometry, producer, add=add, features=features)


conv_producer_backward = Op(_conv_producer_backward, check=_check_producer_backward)


@conv_producer_backward.triton
def _conv_producer_backward_triton(
    dy: OutputGrad,
    u: ConvInput,
    weight: Tensor,
    geometry: Geometry,
    producer: Producer,
    *,
    add: Added | None = None,
    features: FeatureGrads | None = None,
) -> tuple[Tensor, ProducerGrad]:
    if features is not None and not takes(features, producer, weight):
        return NotImplemented
    ways: dict[str, Any] = {
        "joint": _producer_jointly, "apart": _producer_apart, "written": _producer_written,
    }  # fmt: skip
    rule = _rule(dy, weight, geometry, _narrow_producer(dy, weight, geometry, producer, add))
    operands = (dy, u, weight, geometry, producer)
    way = fastest("conv_producer_backward", {rule: ways[rule], **ways}, *operands, add=add, features=features)
    found: tuple[Tensor, ProducerGrad] = ways[way](*operands, add=add, features=features)
    return found


def _narrow_producer(
    dy: OutputGrad, weight: Tensor, geometry: Geometry, producer: Producer, add: Added | None, *, weighed: bool = True
) -> tuple[ConvVariant, BackwardTile] | None:
    if producer.out is not None and producer.act.needs_input:  # the kernel tells the slope from what is convolved
        return None
    return _narrow(dy, producer.output, weight, geometry, add, producer=True, weighed=weighed)


def _producer_jointly(
    dy: OutputGrad, u: ConvInput, weight: Tensor, geometry: Geometry, producer: Producer, *, add: Added | None = None,
    features: FeatureGrads | None = None,
) -> tuple[Tensor, ProducerGrad]:  # fmt: skip
    """By one launch, where a tile fits."""
    narrow = _narrow_producer(dy, weight, geometry, producer, add, weighed=False)
    if narrow is None:
        return NotImplemented
    launched = _launched(dy, producer.output, weight, geometry, *narrow, add=add, producer=producer, features=features)
    assert launched.sums is not None
    return launched.dw, ProducerGrad(launched.du, launched.sums)


def _producer_apart(
    dy: OutputGrad, u: ConvInput, weight: Tensor, geometry: Geometry, producer: Producer, *, add: Added | None = None,
    features: FeatureGrads | None = None,
) -> tuple[Tensor, ProducerGrad]:  # fmt: skip
    """By two, whose sums are finished by one launch more."""
    size = tuple(producer.y.shape)
    parts = None
    if why_no_kernel(dy, weight, size, geometry) is None:
        parts = unsummed_weight_grad(dy, u, (weight.shape[2], weight.shape[3]), geometry)
    if parts is None:
        return _conv_producer_backward(dy, u, weight, geometry, producer, add=add, features=features)
    launched = launch_input_grad(
        dy, weight, size, geometry, producer=producer, add=add, features=features, weight_parts=parts.unsummed
    )
    assert launched.sums is not None
    return parts.of(launched.weight).dw, ProducerGrad(launched.g, launched.sums)


def _producer_written(
    dy: OutputGrad, u: ConvInput, weight: Tensor, geometry: Geometry, producer: Producer, *, add: Added | None = None,
    features: FeatureGrads | None = None,
) -> tuple[Tensor, ProducerGrad]:  # fmt: skip
    """By two, after dy has been written to memory, if it has parts."""
    if dy.q is None:
        return NotImplemented
    at_hand = OutputGrad(bn_backward_apply(dy))
    return _producer_apart(at_hand, u, weight, geometry, producer, add=add, features=features)


class _Launched(NamedTuple):
    dw: Tensor
    du: Tensor
    sums: NormSums | None


def _narrow(
    dy: OutputGrad,
    u: ConvInput,
    weight: Tensor,
    geometry: Geometry,
    add: Added | None,
    *,
    producer: bool,
    weighed: bool = True,
) -> tuple[ConvVariant, BackwardTile] | None:
    """The convolution and its tile where one launch makes both gradients."""
    x = u.tensor
    if math.prod(geometry.stride) > 1 or geometry.groups > 1 or x.dtype != weight.dtype or u.blocks is not None:
        return None
    if why_no_kernel(dy, weight, tuple(x.shape), geometry) is not None:
        return None
    k, c, r, s = weight.shape
    shape = ConvVariant(pixels(x), c, k, 1, r, s, weight.element_size(), prologue=producer, operands=operands_of(dy))
    other = from_elsewhere(add)
    unpacked = other is not None and (producer or is_pooled(other.g))
    masks = [dy.mask, other.mask if other is not None and unpacked else None]
    tile = backward_tile(shape, target_of(weight), bits=any(map(is_bits, masks)), weighed=weighed)
    return None if tile is None else (shape, tile)


def _writing_pays(dy: OutputGrad, weight: Tensor, geometry: Geometry) -> bool:
    """Whether dy is written to memory first, which is faster than to form it in both of two launches."""
    if dy.q is None:
        return False
    k, c, r, s = weight.shape
    shape = ConvVariant(
        pixels(dy.g), c, k // geometry.groups, geometry.groups, r, s, weight.element_size(), operands=operands_of(dy)
    )
    return depthwise(shape) or writing_pays(shape, target_of(weight))


def _launched(
    dy: OutputGrad, u: ConvInput, weight: Tensor, geometry: Geometry, shape: ConvVariant, tile: BackwardTile, *,
    add: Added | None, producer: Producer | None = None, features: FeatureGrads | None = None,
) -> _Launched:  # fmt: skip
    """The kernel, and what adds its parts."""
    from fusedres.kernels.conv_backward import conv_backward_kernel

    x, size = row_layout(u.tensor), (dy.g.shape[2], dy.g.shape[3])
    x_row = pitch_of(x)
    taps = (shape.r, shape.s, shape.c)
    norm = producer and producer.norm
    raw = None if producer is None or producer.out is None else channels_last(producer.y)
    other = from_elsewhere(add)
    out = written_to(x, weight, tuple(x.shape), add, features)
    parts = torch.empty((tile.parts, shape.k * math.prod(taps)), dtype=torch.float32, device=x.device)
    sums = products = None
    if norm is not None:
        sums, products = torch.empty((2, tile.parts, shape.c), dtype=torch.float32, device=x.device)
    arriving = gradient_arguments(dy)
    pooled = arriving.pop("image") is not None
    masks = mask_arguments(other, "add_")
    act = device_activation(u.act, u.scale) if producer is None else device_activation(producer.act)
    beside: dict[str, Any] = {
        "w_ptr": channels_last(weight), "x_ptr": x, "x_scale_ptr": u.scale, "x_shift_ptr": u.shift,
        "x_mean_ptr": norm and norm.mean, "raw_ptr": raw, "add_ptr": other and gradient(other.g)["g_ptr"],
        "add_mask_ptr": masks["add_mask_ptr"], "onto_ptr": features and features.before,
    }  # fmt: skip
    written = {"out_ptr": out, "part_g_ptr": sums, "part_gd_ptr": products, "dw_ptr": parts}
    arguments = window_arguments(x, shape, size, geometry, c_rows=[x_row])
    for name in ("groups", "stride_h", "stride_w"):
        del arguments[name]
    launch(
        conv_backward_kernel, (tile.parts * tile.pieces(shape),),
        {
            **arriving, **beside, **written, **arguments, **added_geometry(add), "x_row": x_row, "X_ACT": act,
            "ADD_ACT": masks["ADD_ACT"],
            "pixels_per_part": tile.per_part(shape.pixels), "POOLED": pooled,
            "ADD_POOLED": other is not None and is_pooled(other.g),
            "WINDOWED": taps[:2] != (1, 1) or geometry.padding != (0, 0),
            "BLOCK_PIXELS": tile.block_pixels, "BLOCK_C": tile.block_c, "BLOCK_K": tile.block_k,
        },
        reads=(*GRADIENT, *beside), kind="both gradients", writes=tuple(written),
        partial=bytes_reached(dy, weight, tuple(x.shape), geometry) | added_read(add, other),
        flops=4 * pixels(dy.g) * weight.numel(), steps=(tile.steps(shape.pixels),), **tile.options,
    )  # fmt: skip
    done: Finished | None = None
    if sums is not None and products is not None and norm is not None:
        done = finished(sums, products, shape.pixels, norm, parts if len(parts) > 1 else None)
    dw = parts_summed(parts) if done is None or done.weight is None else done.weight
    return _Launched(dw.view(shape.k, *taps).permute(0, 3, 1, 2), out, done and done.sums)
