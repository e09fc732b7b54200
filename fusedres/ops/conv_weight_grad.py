"""The gradient of a convolution's weight, both operands formed on load."""

import torch
from torch import Tensor

from .. import backends
from ..launch import launch, multiplies_in_tf32
from ..plan.conv_tiles import ConvShape, WeightGradTile, depthwise, weight_grad_tiles
from ..plan.tiles import alignment
from .bn_backward import bn_backward_apply
from .contract import ConvInput, Geometry, OutputGrad, channels_last, check_activation, statistics_dtype
from .contractions import FLAT_CHANNELS, touched
from .conv_forward import formed
from .op import Op
from .relu_mask import laid_out
from .rows import storable


def weight_grad(dy: Tensor, u: Tensor, kernel: tuple[int, int], geometry: Geometry) -> Tensor:
    """The correlation of ``dy`` with ``u``, as the library computes it."""
    stride, padding, dilation, groups = geometry
    # Only the shape and layout of this operand are read.
    shape = (dy.shape[1], u.shape[1] // groups, *kernel)
    like = torch.empty(shape, dtype=u.dtype, device=u.device, memory_format=torch.channels_last)
    dw: Tensor = torch.ops.aten.convolution_backward(
        dy, u, like, None, stride, padding, dilation, False, (0, 0), groups, (False, True, False)
    )[1]
    return dw


def _conv_weight_grad(dy: OutputGrad, u: ConvInput, kernel: tuple[int, int], geometry: Geometry) -> Tensor:
    """dW[k, c, r, s] = sum over pixels of dy[k] * u[c] under tap (r, s).

    Args:
        dy: (N, K, P, Q), formed on load.
        u: (N, C, H, W), formed on load.
        kernel: (R, S).
        geometry: that of the forward convolution.

    Returns:
        dW (K, C/groups, R, S) in the statistics dtype.
    """
    check_activation("dy", dy.g)
    check_activation("u", u.tensor)
    dtype = statistics_dtype(u.tensor.dtype)
    return weight_grad(bn_backward_apply(dy).to(dtype), formed(u).to(dtype), kernel, geometry)


conv_weight_grad = Op(_conv_weight_grad)


@conv_weight_grad.triton
def _conv_weight_grad_triton(dy: OutputGrad, u: ConvInput, kernel: tuple[int, int], geometry: Geometry) -> Tensor:
    check_activation("dy", dy.g)
    check_activation("u", u.tensor)
    plain = dy.p is None and dy.mask is None and u.scale is None
    if (backends.runs_native() and plain) or not storable(dy.g, dy.y, u.tensor) or dy.g.dtype != u.tensor.dtype:
        return NotImplemented
    shape = _shape(dy, u, kernel, geometry)
    tiles = weight_grad_tiles(shape)
    if not tiles or depthwise(shape):
        return NotImplemented
    return _launched(dy, u, geometry, shape, tiles[0])


def _shape(dy: OutputGrad, u: ConvInput, kernel: tuple[int, int], geometry: Geometry) -> ConvShape:
    n, k, p, q = dy.g.shape
    groups, c = geometry.groups, u.tensor.shape[1] // geometry.groups
    flat = c <= FLAT_CHANNELS and groups == 1 and geometry.dilation[1] == 1 and u.scale is None
    return ConvShape(n * p * q, c, k // groups, groups, *kernel, u.tensor.element_size(), flat, u.scale is not None)


def _launched(dy: OutputGrad, u: ConvInput, geometry: Geometry, shape: ConvShape, tile: WeightGradTile) -> Tensor:
    from ..kernels.conv_weight_grad import conv_weight_grad_kernel, sum_parts_kernel

    x, g = channels_last(u.tensor), channels_last(dy.g)
    n, channels, h, w = x.shape
    _, k, p, q = g.shape
    stride, padding, dilation, groups = geometry
    parts = torch.empty((tile.parts, k, shape.r, shape.s, shape.c), dtype=torch.float32, device=x.device)
    whole = dy.p is not None and dy.q is not None and dy.r is not None and dy.y is not None
    y_part = {"y_ptr": laid_out(dy.y), "q_ptr": dy.q, "r_ptr": dy.r, "mean_ptr": dy.mean}
    read = {
        "g_ptr": g, "mask_ptr": laid_out(dy.mask), "p_ptr": dy.p, **(y_part if whole else dict.fromkeys(y_part)),
        "x_ptr": x, "scale_ptr": u.scale, "shift_ptr": u.shift,
    }  # fmt: skip
    covered = n * channels * x.element_size()
    for side, windows, taps, *steps in zip((h, w), (p, q), (shape.r, shape.s), stride, padding, dilation, strict=True):
        covered *= touched(side, windows, taps, *steps)
    launch(
        conv_weight_grad_kernel, (tile.tiles(shape) * tile.parts,),
        {
            **read, "dw_ptr": parts, "pixels": shape.pixels, "pixels_per_part": tile.per_part(shape.pixels),
            "groups": groups, "C": shape.c, "K": shape.k, "H": h, "W": w, "P": p, "Q": q,
            "stride_h": stride[0], "stride_w": stride[1], "pad_h": padding[0], "pad_w": padding[1],
            "dilation_h": dilation[0], "dilation_w": dilation[1], "R": shape.r, "S": shape.s, "FLAT": shape.flat,
            "GROUPS_PER_TILE": tile.groups_per_tile,
            "TF32": multiplies_in_tf32(x),
            "C_MULTIPLE": alignment(shape.c), "K_MULTIPLE": alignment(shape.k),
            "BLOCK_PIXELS": tile.block_pixels, "BLOCK_K": tile.block_k, "BLOCK_C": tile.block_c,
        },
        reads=tuple(read), writes=("dw_ptr",), partial={"x_ptr": covered},
        flops=2 * shape.pixels * parts[0].numel(), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    total = parts[0]
    if tile.parts > 1:
        total, block = torch.empty_like(parts[0]), 1024
        launch(
            sum_parts_kernel, (-(-total.numel() // block),),
            {"part_ptr": parts, "total_ptr": total, "parts": tile.parts, "size": total.numel(), "BLOCK": block},
            reads=("part_ptr",), writes=("total_ptr",), flops=parts.numel(),
        )  # fmt: skip
    return total.permute(0, 3, 1, 2)


@conv_weight_grad.native
def _conv_weight_grad_native(dy: OutputGrad, u: ConvInput, kernel: tuple[int, int], geometry: Geometry) -> Tensor:
    check_activation("dy", dy.g)
    check_activation("u", u.tensor)
    dw = weight_grad(bn_backward_apply(dy), formed(u), kernel, geometry)
    return dw.to(statistics_dtype(dw.dtype))
