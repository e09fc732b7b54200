"""The gradient of a convolution's weight, both operands formed on load."""

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres.compiler.binary import ALIGNMENT
from fusedres.operands import ConvInput, Geometry, OutputGrad, PoolGeometry, statistics_dtype
from fusedres.ops.bn_backward import GRADIENT, bn_backward_apply, gradient_arguments, operands_of
from fusedres.ops.checks import check_activation
from fusedres.ops.contractions import bytes_in_windows, columns_apart, in_pairs, shape_of, window_arguments
from fusedres.ops.conv_forward import conv_operand
from fusedres.ops.device import device_activation
from fusedres.ops.op import Op
from fusedres.ops.rows import channels_last, pitch_of, row_layout, storable
from fusedres.plan.conv_tiles import WeightGradTile, weight_grad_tiles
from fusedres.plan.shapes import ConvVariant, depthwise
from fusedres.plan.tiles import chosen
from fusedres.runtime import backends
from fusedres.runtime.launch import launch, target_of


def weight_grad(dy: Tensor, u: Tensor, kernel: tuple[int, int], geometry: Geometry) -> Tensor:
    """The correlation of ``dy`` with ``u``, as the library computes it."""
    stride, padding, dilation, groups = geometry
    if kernel == (1, 1) and padding == (0, 0) and stride != (1, 1) and u.device.type == "cpu":
        # oneDNN 3.x (torch 2.14, AVX-512) writes beyond its scratch here, for more than one image of fewer than 8
        # channels: the heap is corrupt afterwards.
        sampled = u[:, :, :: stride[0], :: stride[1]][:, :, : dy.shape[2], : dy.shape[3]]
        u, stride = channels_last(sampled), (1, 1)
    # Only the shape and layout of this operand are read.
    shape = (dy.shape[1], u.shape[1] // groups, *kernel)
    like = torch.empty(shape, dtype=u.dtype, device=u.device, memory_format=torch.channels_last)
    dw: Tensor = torch.ops.aten.convolution_backward(
        dy, u, like, None, stride, padding, dilation, False, (0, 0), groups, (False, True, False)
    )[1]
    return dw


def _check(dy: OutputGrad, u: ConvInput, kernel: tuple[int, int], geometry: Geometry) -> None:
    check_activation("dy", dy.g)
    check_activation("u", u.tensor)


def _conv_weight_grad(dy: OutputGrad, u: ConvInput, kernel: tuple[int, int], geometry: Geometry) -> Tensor:
    """dW[k, c, r, s] = sum over pixels of dy[k] * u[c] under tap (r, s).

    Args:
        dy: (N, K, P, Q), formed on load.
        u: (N, C, H, W), formed on load; a slice of wider rows (`pitch_of`) is read where it is.
        kernel: (R, S).
        geometry: that of the forward convolution.

    Returns:
        dW (K, C/groups, R, S) in the statistics dtype.
    """
    dtype = statistics_dtype(u.tensor.dtype)
    return weight_grad(bn_backward_apply(dy).to(dtype), conv_operand(u).to(dtype), kernel, geometry)


conv_weight_grad = Op(_conv_weight_grad, check=_check)


@conv_weight_grad.triton
def _conv_weight_grad_triton(dy: OutputGrad, u: ConvInput, kernel: tuple[int, int], geometry: Geometry) -> Tensor:
    plain = dy.p is None and dy.mask is None and u.scale is None
    if backends.runs_native() and plain:
        return NotImplemented
    launched = summed_weight_grad(dy, u, kernel, geometry, sum_dy=False)
    return NotImplemented if launched is None else launched.dw


class WeightSums(NamedTuple):
    """dW (K, C/groups, R, S), and if asked for sum(dy) (K,) and the sum of u's windows (C, R, S); all fp32."""

    dw: Tensor
    sum_dy: Tensor | None
    sum_u: Tensor | None


class Pooled(NamedTuple):
    """That dy is still at the output of max-pooling: `stem_pool`'s compact index, its window, (N, K, P, Q) of dy."""

    maxima: Tensor
    pool: PoolGeometry
    size: tuple[int, ...]


def summed_weight_grad(
    dy: OutputGrad, u: ConvInput, kernel: tuple[int, int], geometry: Geometry, *, pooled: Pooled | None = None,
    sum_dy: bool = True, sum_u: bool = False,
) -> WeightSums | None:  # fmt: skip
    """dW by the kernel, with the sum of dy (which is the masked g alone then) and of u's windows if asked for.

    None where there is no kernel.
    """
    if not storable(dy.g, dy.y, u.tensor) or dy.g.dtype != u.tensor.dtype:
        return None
    n, k, p, q = dy.g.shape if pooled is None else pooled.size
    shape = shape_of(u, n * p * q, k, kernel, geometry)._replace(operands=operands_of(dy) + (pooled is not None))
    tiles = weight_grad_tiles(shape, target_of(u.tensor))
    if not tiles or depthwise(shape):
        return None
    return _launched(dy, u, geometry, shape, (p, q), chosen(tiles), pooled, sum_dy=sum_dy, sum_u=sum_u)


def _launched(
    dy: OutputGrad, u: ConvInput, geometry: Geometry, shape: ConvVariant, size: tuple[int, int], tile: WeightGradTile,
    pooled: Pooled | None, *, sum_dy: bool, sum_u: bool,
) -> WeightSums:  # fmt: skip
    """The kernel, and where the pixels come in parts a second that adds them."""
    from fusedres.kernels.conv_weight_grad import conv_weight_grad_kernel

    x = row_layout(u.tensor)
    x_row = pitch_of(x)
    k = shape.groups * shape.k
    taps = (shape.r, shape.s, shape.c)
    sizes = [k * math.prod(taps), k * sum_dy, math.prod(taps) * sum_u]
    parts = torch.empty((tile.parts, sum(sizes)), dtype=torch.float32, device=x.device)
    read = {**gradient_arguments(dy), "x_ptr": x, "scale_ptr": u.scale, "shift_ptr": u.shift}
    acts = {"X_ACT": device_activation(u.act, u.scale)}
    steps, run = shape.pixels, shape.pixels
    if shape.flat:
        run = size[1]  # a step stays in one row of the output
        steps = shape.pixels // run * -(-run // tile.block_pixels) * tile.block_pixels
    covered = bytes_in_windows(x, size, (shape.r, shape.s), geometry)
    launch(
        conv_weight_grad_kernel, (tile.pieces(shape) * tile.parts,),
        {
            **read, **acts, "out_ptr": parts, "x_row": x_row,
            **window_arguments(x, shape._replace(pixels=steps), size, geometry, c_rows=[x_row]),
            **_pooling(pooled, dy.g),
            "pixels_per_part": tile.per_part(steps), "GROUPS_PER_TILE": tile.groups_per_tile,
            "SUM_DY": sum_dy, "SUM_U": sum_u, "PADDED": geometry.padding != (0, 0),
            "SAME": geometry.stride == (1, 1) and size == x.shape[2:], "PAIRS": in_pairs(x, target_of(x)),
            "APART": columns_apart(x, target_of(x)),
            "EVEN_PIXELS": run % tile.block_pixels == 0, "EVEN_K": k % tile.block_k == 0,
            "EVEN_C": tile.whole_columns(shape),
            "BLOCK_PIXELS": tile.block_pixels, "BLOCK_K": tile.block_k, "BLOCK_C": tile.block_c,
        },
        reads=(*GRADIENT, "index_ptr", "x_ptr", "scale_ptr", "shift_ptr"), kind="weight gradient", writes=("out_ptr",),
        partial={"x_ptr": covered}, flops=2 * shape.pixels * sizes[0],
        **tile.options,
    )  # fmt: skip
    dw, dy_total, u_total = parts_summed(parts).split(sizes)
    return WeightSums(
        dw.view(k, *taps).permute(0, 3, 1, 2), dy_total if sum_dy else None,
        u_total.view(taps).permute(2, 0, 1) if sum_u else None,
    )  # fmt: skip


def parts_summed(parts: Tensor) -> Tensor:
    """The sum of (parts, size) fp32 along the first dimension, in its order; by a launch if there are several."""
    from fusedres.kernels.conv_weight_grad import sum_parts_kernel

    if len(parts) == 1:
        return parts[0]
    # Of rows not known to begin at 16 bytes, neighbouring lanes take neighbouring numbers, one each.
    total, block = torch.empty_like(parts[0]), 1024 if parts.shape[1] % ALIGNMENT == 0 else 128
    launch(
        sum_parts_kernel, (-(-total.numel() // block),),
        {"part_ptr": parts, "total_ptr": total, "parts": len(parts), "size": total.numel(), "BLOCK": block},
        reads=("part_ptr",), kind="weight gradient", writes=("total_ptr",), flops=parts.numel(),
    )  # fmt: skip
    return total


def _pooling(pooled: Pooled | None, g: Tensor) -> dict[str, Any]:
    names = [f"POOL_{name}" for name in ("R", "S", "STRIDE_H", "STRIDE_W", "PAD_H", "PAD_W")]
    if pooled is None:
        return {"index_ptr": None, "pooled_P": 1, "pooled_Q": 1, **dict.fromkeys(names, 1)}
    sizes = {"pooled_P": g.shape[2], "pooled_Q": g.shape[3]}
    return {
        "index_ptr": channels_last(pooled.maxima), **sizes,
        **dict(zip(names, itertools.chain(*pooled.pool), strict=True)),
    }  # fmt: skip


@conv_weight_grad.native
def _conv_weight_grad_native(dy: OutputGrad, u: ConvInput, kernel: tuple[int, int], geometry: Geometry) -> Tensor:
    dw = weight_grad(bn_backward_apply(dy), conv_operand(u), kernel, geometry)
    return dw.to(statistics_dtype(dw.dtype))
