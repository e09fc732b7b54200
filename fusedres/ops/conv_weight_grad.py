"""The gradient of a convolution's weight, both operands formed on load."""

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres.operands import ConvInput, Geometry, OutputGrad, PixelBlocks, PoolGeometry, statistics_dtype
from fusedres.ops.act_mask import is_pooled
from fusedres.ops.bn_backward import GRADIENT, bn_backward_apply, gradient_arguments, operands_of
from fusedres.ops.checks import check_activation
from fusedres.ops.contractions import (
    columns_apart,
    in_pairs,
    left_to_library,
    operand_of,
    packed_as,
    shape_of,
    window_arguments,
)
from fusedres.ops.conv_forward import conv_operand
from fusedres.ops.device import device_activation
from fusedres.ops.op import Op
from fusedres.ops.rows import channels_last, storable
from fusedres.ops.space_to_depth import packed_sums
from fusedres.plan.conv_tiles import WeightGradTile, weight_grad_tile
from fusedres.plan.shapes import ConvVariant, depthwise
from fusedres.plan.tiles import AddedTile
from fusedres.runtime import backends
from fusedres.runtime.launch import launch, target_of
from fusedres.traffic.weigh import fastest


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


conv_weight_grad = Op(_conv_weight_grad, check=_check, weighed=True)


@conv_weight_grad.triton
def _conv_weight_grad_triton(dy: OutputGrad, u: ConvInput, kernel: tuple[int, int], geometry: Geometry) -> Tensor:
    if backends.runs_native() and _is_plain(dy, u):
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
    parts = weight_grad_parts(dy, u, kernel, geometry, pooled=pooled, sum_dy=sum_dy, sum_u=sum_u)
    return None if parts is None else parts.of(parts_summed(parts.tensor))


class WeightParts(NamedTuple):
    """What the kernel leaves, (parts, values) fp32.

    A part is dW (K, R, S, C/groups), sum(dy) and the sum of u's windows; ``sizes`` are how many values of each, of a
    window of ``taps`` = (R, S, C/groups). Of packed images (``blocks``) parts are those of packed windows.
    """

    tensor: Tensor
    taps: tuple[int, int, int]
    sizes: list[int]
    blocks: PixelBlocks | None = None

    @property
    def unsummed(self) -> Tensor | None:
        """The parts, if there is more to be done than to take the only one as it is."""
        return None if len(self.tensor) == 1 and self.tensor.dtype == torch.float32 else self.tensor

    @property
    def whole(self) -> Tensor:
        """The parts of dW and sum(dy); of packed windows one, of those that are meant."""
        if self.blocks is None:
            return self.tensor
        sums = self.of(parts_summed(self.tensor))
        assert sums.sum_dy is not None
        return torch.cat([sums.dw.permute(0, 2, 3, 1).reshape(-1), sums.sum_dy])[None]

    def of(self, total: Tensor | None) -> WeightSums:
        """All parts together, taken apart; None where there is one."""
        total = self.tensor[0] if total is None else total
        if self.blocks is not None:
            k, sum_dy, sum_u = self.sizes[0] // math.prod(self.taps), *map(bool, self.sizes[1:])
            total = packed_sums(total, k, self.blocks, sum_dy=sum_dy, sum_u=sum_u)
        dw, dy_total, u_total = total.split(self.sizes)
        return WeightSums(
            dw.view(-1, *self.taps).permute(0, 3, 1, 2), dy_total if self.sizes[1] else None,
            u_total.view(self.taps).permute(2, 0, 1) if self.sizes[2] else None,
        )  # fmt: skip


def unsummed_weight_grad(
    dy: OutputGrad, u: ConvInput, kernel: tuple[int, int], geometry: Geometry
) -> WeightParts | None:
    """`conv_weight_grad` as it comes from our kernel or, in one part of the storage dtype, from the library.

    None where there is no kernel and something to be formed.
    """
    if backends.runs_native() and _is_plain(dy, u):
        return _parts_by_library(dy, u, kernel, geometry)
    ways: dict[str, Any] = {"kernels": _parts_by_kernels, "library": _parts_by_library}
    way = fastest("weight parts", ways, dy, u, kernel, geometry)
    return (
        _parts_by_library(dy, u, kernel, geometry) if way == "library" else _parts_by_kernels(dy, u, kernel, geometry)
    )


def _parts_by_kernels(dy: OutputGrad, u: ConvInput, kernel: tuple[int, int], geometry: Geometry) -> WeightParts | None:
    return weight_grad_parts(dy, u, kernel, geometry, sum_dy=False)


def _parts_by_library(dy: OutputGrad, u: ConvInput, kernel: tuple[int, int], geometry: Geometry) -> WeightParts:
    rows = weight_grad(bn_backward_apply(dy), conv_operand(u), kernel, geometry).permute(0, 2, 3, 1)
    r, s, c = rows.shape[1:]
    return WeightParts(rows.reshape(1, -1), (r, s, c), [rows.numel(), 0, 0])


def _is_plain(dy: OutputGrad, u: ConvInput) -> bool:
    """Whether both operands are there as they are multiplied."""
    return dy.p is None and dy.mask is None and u.scale is None and u.blocks is None


def weight_grad_parts(
    dy: OutputGrad, u: ConvInput, kernel: tuple[int, int], geometry: Geometry, *, pooled: Pooled | None = None,
    sum_dy: bool = True, sum_u: bool = False,
) -> WeightParts | None:  # fmt: skip
    """`summed_weight_grad` before its parts are added."""
    if not storable(dy.g, dy.y, u.tensor) or dy.g.dtype != u.tensor.dtype:
        return None
    n, k, p, q = dy.g.shape if pooled is None else pooled.size
    plain = dy.p is None and dy.mask is None and pooled is None and not is_pooled(dy.g)
    plain = plain and packed_as(u, kernel, geometry) is None
    same = geometry.stride == (1, 1) and (p, q) == u.size[2:]
    shape = shape_of(u, n * p * q, k, kernel, geometry)._replace(
        operands=operands_of(dy) + (pooled is not None), copied=plain and same and not (sum_dy or sum_u)
    )
    if depthwise(shape) or left_to_library(u, shape, kernel, geometry):
        return None
    tile = weight_grad_tile(shape, target_of(u.tensor))
    if tile is None:
        return None
    return _launched(dy, u, kernel, geometry, shape, tile, pooled, sum_dy=sum_dy, sum_u=sum_u)


def _launched(
    dy: OutputGrad, u: ConvInput, kernel: tuple[int, int], geometry: Geometry, shape: ConvVariant,
    tile: WeightGradTile, pooled: Pooled | None, *, sum_dy: bool, sum_u: bool,
) -> WeightParts:  # fmt: skip
    from fusedres.kernels.conv_weight_grad import conv_weight_grad_kernel

    x, x_row, over, size, covered, blocks = operand_of(u, kernel, geometry)
    k, taps = shape.groups * shape.k, (*kernel, u.size[1] // geometry.groups)
    length = sum(_sizes(k, shape.taps * shape.c, sum_dy, sum_u))
    parts = torch.empty((tile.parts, length), dtype=torch.float32, device=x.device)
    read = {**gradient_arguments(dy), "x_ptr": x, "scale_ptr": u.scale, "shift_ptr": u.shift}
    acts = {"X_ACT": device_activation(u.act, u.scale)}
    target, same = target_of(x), over.stride == (1, 1) and size == x.shape[2:]
    launch(
        conv_weight_grad_kernel, (tile.pieces(shape) * tile.parts,),
        {
            **read, **acts, "out_ptr": parts, "x_row": x_row,
            **window_arguments(x, shape, size, over, c_rows=[x_row]),
            **_pooling(pooled, dy.g),
            "pixels_per_part": tile.per_part(shape.pixels), "GROUPS_PER_TILE": tile.groups_per_tile,
            "SUM_DY": sum_dy, "SUM_U": sum_u, "PADDED": over.padding != (0, 0),
            "SAME": same, "TURNED": tile.turned(shape, target), "TAPS": tile.taps,
            "INPUT_ONCE": tile.taps > 1 and shape.copied, "PAIRS": in_pairs(x, target),
            "APART": columns_apart(x, target),
            "EVEN_PIXELS": shape.pixels % tile.block_pixels == 0, "EVEN_K": k % tile.block_k == 0,
            "EVEN_C": tile.whole_columns(shape), "ROWS_DY": tile.rows_at_once(tile.block_k, shape, target),
            "ROWS_U": tile.rows_at_once(tile.block_c, shape, target),
            "BLOCK_PIXELS": tile.block_pixels, "BLOCK_K": tile.block_k, "BLOCK_C": tile.block_c,
        },
        reads=(*GRADIENT, "index_ptr", "x_ptr", "scale_ptr", "shift_ptr"), kind="weight gradient", writes=("out_ptr",),
        partial={"x_ptr": covered}, flops=2 * shape.pixels * k * math.prod(taps),
        steps=(tile.steps(shape.pixels),), **tile.options,
    )  # fmt: skip
    return WeightParts(parts, taps, _sizes(k, math.prod(taps), sum_dy, sum_u), blocks)


def _sizes(k: int, depth: int, sum_dy: bool, sum_u: bool) -> list[int]:
    """Of dW and of the sums."""
    return [k * depth, k * sum_dy, depth * sum_u]


def parts_summed(parts: Tensor) -> Tensor:
    """The sum of (parts, size) fp32 along the first dimension; by a launch if there are several."""
    from fusedres.kernels.parts import sum_parts_kernel

    if len(parts) == 1:
        return parts[0]
    total, tile = torch.empty_like(parts[0]), AddedTile()
    launch(
        sum_parts_kernel, (-(-total.numel() // tile.block),),
        {
            "part_ptr": parts, "total_ptr": total, "parts": len(parts), "size": total.numel(),
            "BLOCK_PARTS": tile.block_parts, "BLOCK": tile.block,
        },
        reads=("part_ptr",), kind="weight gradient", writes=("total_ptr",), flops=parts.numel(),
        steps=(-(-len(parts) // tile.block_parts),), **tile.options,
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
