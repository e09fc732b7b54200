"""What the launches of `conv_input_grad_kernel` have in common: whether there is a kernel, its tile, its arguments."""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres.operands import ConvInput, Geometry, OutputGrad, Producer
from fusedres.ops.act_mask import gradient, is_bits, is_pooled, laid_out, mask_arguments
from fusedres.ops.bn_backward import GRADIENT, NormSums, finished, gradient_arguments, masked_gradient, operands_of
from fusedres.ops.contractions import (
    LARGEST_OFFSET,
    LARGEST_WINDOW,
    bytes_in_windows,
    columns_apart,
    in_pairs,
    window_arguments,
)
from fusedres.ops.device import device_activation
from fusedres.ops.features import FeatureGrads
from fusedres.ops.rows import channels_last, empty_rows, pitch_of, pixels, row_layout, storable, word_channels
from fusedres.ops.zero_pad_shortcut import Added, ZeroPaddedGrad, added_geometry, added_read
from fusedres.plan.conv_tiles import ConvTile, conv_tile
from fusedres.plan.shapes import ConvVariant, depthwise
from fusedres.runtime.launch import launch, target_of


class InputMatrices(NamedTuple):
    """What the moments form adds at the pixels that a 1x1 convolution reads: u ``quadratic`` + sum of ``constants``.

    ``quadratic`` is (C, terms, C) in the storage dtype, each term symmetric; ``constants`` (T, C) in fp32.
    """

    quadratic: Tensor
    constants: Tensor


class Launched(NamedTuple):
    """The input's gradient, its sums where a producer was given, and the weight's whose parts were."""

    g: Tensor
    sums: NormSums | None = None
    weight: Tensor | None = None


def why_no_kernel(dy: OutputGrad, weight: Tensor, size: tuple[int, ...], geometry: Geometry) -> str | None:
    """Why an input gradient runs on the library and not on our kernels, or None."""
    shape = gradient_shape(dy, weight, size, geometry)
    if not storable(dy.g, dy.y, weight):
        return f"{dy.g.dtype} has no kernels"
    if dy.g.dtype != weight.dtype or (dy.y is not None and dy.y.dtype != weight.dtype):
        return f"dy in {dy.g.dtype} and the weight in {weight.dtype}"
    if depthwise(shape):
        return "depthwise: too few channels of a group for tensor cores"
    if max(shape.r, shape.s) > LARGEST_WINDOW:
        return f"a window of {shape.r} x {shape.s} pixels: kernels take at most {LARGEST_WINDOW}"
    if shape.r * geometry.dilation[0] * dy.g.shape[3] * dy.g.shape[1] >= LARGEST_OFFSET:
        return "a window of more than 2**31 values"
    return None


def gradient_shape(
    dy: OutputGrad, weight: Tensor, size: tuple[int, ...], geometry: Geometry, *, second: bool = False
) -> ConvVariant:
    """What tiles depend on; its pixels are those of the largest class."""
    n, c, h, w = size
    k, _, r, s = weight.shape
    groups, stride = geometry.groups, geometry.stride
    formed = dy.p is not None or dy.mask is not None
    pixels_ = n * -(-h // stride[0]) * -(-w // stride[1])
    return ConvVariant(
        pixels_, k // groups, c // groups, groups, r, s, weight.element_size(), prologue=formed or second,
        second=second, operands=operands_of(dy), gradient=True,
    )  # fmt: skip


def launch_input_grad(
    dy: OutputGrad, weight: Tensor, size: tuple[int, ...], geometry: Geometry, *, x: ConvInput | None = None,
    matrices: InputMatrices | None = None, add: Added | None = None, producer: Producer | None = None,
    x_stride: tuple[int, int] | None = None, features: FeatureGrads | None = None, weight_parts: Tensor | None = None,
) -> Launched:  # fmt: skip
    """The kernel, with whatever is joined to it.

    Args:
        dy, weight, size, geometry: as of `conv_input_grad`.
        x: (N, C, H, W) what the convolution consumed, with ``matrices``.
        matrices: of the moments form.
        add: another gradient of the input.
        x_stride: where ``size`` is of the pixels alone that a 1x1 convolution reads: how far they are apart in x.
        producer: of the input, behind whose activation the gradient is wanted with its sums.
        features: where that gradient, times the producer's scale, is added, in the layout of x.
        weight_parts: (parts, size) of the weight's gradient, to be added up beside the producer's sums.
    """
    from fusedres.kernels.conv_input_grad import conv_input_grad_kernel

    n, c, h, w = size
    shape = gradient_shape(dy, weight, size, geometry, second=matrices is not None)._replace(
        epilogue_bytes=0 if features is None else features.into.element_size()
    )
    stride, padding, dilation, groups = geometry
    target = target_of(weight)
    tile = conv_tile(shape, target)
    packed, per_tile = tile.groups_per_tile, tile.groups_per_tile * shape.c
    if groups > 1 and is_bits(dy.mask) and packed * shape.c % word_channels(weight.shape[0]):
        dy = dy._replace(g=masked_gradient(dy), mask=None)
    split = groups > 1 and packed * shape.k % word_channels(c) != 0
    other = from_elsewhere(add, split)
    out = written_to(dy.g, weight, size, add, features)
    classes = math.prod(stride)
    tiles = tile.tiles(shape)
    sums = products = raw = open_ = None
    known = False
    if producer is not None:
        if producer.out is not None:
            raw, open_ = channels_last(producer.y), laid_out(producer.mask)
            if split and is_bits(open_):
                open_ = None
        known = open_ is not None or (raw is not None and producer.act.is_identity)
        x = x if known else producer.output
        sums, products = torch.empty((2, classes * tiles, c), dtype=torch.float32, device=out.device)
    window = (shape.r, shape.s)
    consumed, norm = None if x is None else row_layout(x.tensor), producer and producer.norm
    x_row = None if consumed is None else pitch_of(consumed)
    arriving = gradient_arguments(dy)
    pooled = arriving.pop("image") is not None
    masks = mask_arguments(other, "add_")
    acts = {
        "ADD_ACT": masks["ADD_ACT"],
        "X_ACT": device_activation(producer.act if producer is not None else x and x.act, producer or (x and x.scale)),
    }
    beside: dict[str, Any] = {
        "w_ptr": channels_last(weight), "quadratic_ptr": matrices and matrices.quadratic,
        "constant_ptr": matrices and matrices.constants, "x_ptr": consumed,
        "x_scale_ptr": x and x.scale, "x_shift_ptr": x and x.shift, "x_mean_ptr": norm and norm.mean,
        "raw_ptr": raw, "open_ptr": open_,
        "add_ptr": other and gradient(other.g)["g_ptr"], "add_mask_ptr": masks["add_mask_ptr"],
        "onto_ptr": features and features.before,
    }  # fmt: skip
    written = {"out_ptr": out, "part_g_ptr": sums, "part_gd_ptr": products}
    steps = [s // math.gcd(s, d) for s, d in zip(stride, dilation, strict=True)]
    rows = [d // math.gcd(s, d) for s, d in zip(stride, dilation, strict=True)]
    whole = groups % packed == 0
    partial = bytes_reached(dy, weight, size, geometry) | added_read(add, other)
    if consumed is not None and (producer is None or known):
        read = geometry if x_stride is None else geometry._replace(stride=x_stride)
        partial["x_ptr"] = bytes_in_windows(consumed, dy.g.shape[2:], window, read)
    arguments = window_arguments(
        out, shape._replace(pixels=n * h * w, c=shape.k, k=shape.c), (dy.g.shape[2], dy.g.shape[3]), geometry,
        c_rows=[x_row],
    )  # fmt: skip
    launch(
        conv_input_grad_kernel, (classes * tiles * tile.pieces(shape),),
        {
            **arriving, **beside, **written, **acts, **arguments, **added_geometry(add), "x_row": x_row,
            **_consumed(consumed, x_stride or stride), "tiles": tiles,
            "step_r": steps[0], "step_s": steps[1], "row_step": rows[0], "column_step": rows[1],
            "constants": 0 if matrices is None else len(matrices.constants),
            "TERMS": 1 if matrices is None else matrices.quadratic.shape[1],
            "STRIDED": classes > 1, "SAME": classes == 1 and dy.g.shape[2:] == (h, w),
            "X_SAME": consumed is None or consumed.shape[2:] == dy.g.shape[2:],
            "WINDOWED": window != (1, 1) or padding != (0, 0), "POOLED": pooled,
            "ADD_POOLED": other is not None and is_pooled(other.g), "GROUPS_PER_TILE": packed,
            "EVEN_K": whole and per_tile % tile.block_c == 0,
            "EVEN_C": whole and packed * shape.k % tile.block_k == 0,
            "EVEN_DEPTH": matrices is not None and c % tile.block_c == 0, "PAIRS": in_pairs(weight, target),
            "APART": columns_apart(weight, target),
            "BLOCK_PIXELS": tile.block_pixels, "BLOCK_C": tile.block_k, "BLOCK_K": tile.block_c,
        },
        reads=(*GRADIENT, *beside),
        kind="input gradient", writes=tuple(written), partial=partial, flops=_flops(dy, weight, x, matrices),
        steps=[count / classes for count in _steps(shape, tile, matrices)], **tile.options,
    )  # fmt: skip
    if sums is None or products is None or norm is None:
        return Launched(out)
    return Launched(out, *finished(sums, products, n * h * w, norm, weight_parts))


def _steps(shape: ConvVariant, tile: ConvTile, matrices: InputMatrices | None) -> list[int]:
    """Of each loop, all classes together: every tap belongs to one of them, the matrices to the first."""
    if matrices is None:
        return [tile.steps(shape)]
    return [tile.steps(shape), matrices.quadratic.shape[1] * tile.depth_steps(shape.k), len(matrices.constants)]


def _consumed(x: Tensor | None, stride: tuple[int, int]) -> dict[str, int]:
    """Where in x the pixels are that a 1x1 convolution read."""
    high, wide = (1, 1) if x is None else x.shape[2:]
    return {"x_H": high, "x_W": wide, "x_stride_h": stride[0], "x_stride_w": stride[1]}


def written_to(
    like: Tensor, weight: Tensor, size: tuple[int, ...], add: Added | None, features: FeatureGrads | None
) -> Tensor:
    """Where the input's gradient goes: to the features', or a new tensor in the wider dtype of weight and ``add``."""
    if features is not None:
        return features.into
    return empty_rows(like, weight.dtype if add is None else torch.promote_types(weight.dtype, add.g.dtype), size)


def from_elsewhere(add: Added | None, split: bool = False) -> OutputGrad | None:
    """``add`` as the kernel reads it; ``split``: whether a word of its bits may belong to two tiles."""
    if add is None:
        return None
    grad = add.grad if isinstance(add, ZeroPaddedGrad) else add
    if is_bits(grad.mask) and (split or (isinstance(add, ZeroPaddedGrad) and add.places.start % 8)):
        return OutputGrad(masked_gradient(grad))
    return grad


def _flops(dy: OutputGrad, weight: Tensor, x: ConvInput | None, matrices: InputMatrices | None) -> int:
    flops = 2 * pixels(dy.g) * weight.numel()
    if matrices is not None:
        flops += 2 * pixels(dy.g) * matrices.quadratic.numel()
    return flops


def bytes_reached(dy: OutputGrad, weight: Tensor, size: tuple[int, ...], geometry: Geometry) -> dict[str, int]:
    """Bytes of what is not read whole: windows can lie in the padding, and taps of small inputs outside of these."""
    window, steps = weight.shape[2:], (geometry.stride, geometry.padding, geometry.dilation)
    reached, taps = 1, 1
    for side, windows, kernel, *step in zip(size[2:], dy.g.shape[2:], window, *steps, strict=True):
        reached *= windows_inside(side, windows, kernel, *step)
        taps *= taps_inside(side, kernel, *step)
    partial = {"w_ptr": weight.nbytes * taps // math.prod(window)}
    if taps == 0:
        partial |= dict.fromkeys(GRADIENT, 0)
    whole = dy.g.shape[2] * dy.g.shape[3]
    if reached < whole:
        parts = {"g_ptr": None if is_pooled(dy.g) else dy.g, "mask_ptr": dy.mask, "y_ptr": dy.y}
        partial |= {name: part.nbytes * reached // whole for name, part in parts.items() if part is not None}
    return partial


@functools.cache
def windows_inside(side: int, windows: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """How many windows hold one of ``side`` pixels."""
    places = range(side)
    return sum(any(i * stride - padding + j * dilation in places for j in range(kernel)) for i in range(windows))


@functools.cache
def taps_inside(side: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """How many taps belong to a class that has one of ``side`` pixels."""
    return sum((i * dilation - padding) % stride < side for i in range(kernel))
