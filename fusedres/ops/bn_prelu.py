"""Batch norm and a PReLU behind it (He et al. 2015), whose slopes are parameters: the pass and its way back."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fusedres.operands import Normaliser, OutputGrad, statistics_dtype
from fusedres.ops.bn_act import affine, normalised_sum
from fusedres.ops.bn_backward import bn_backward, finished
from fusedres.ops.checks import check_activation, check_vector
from fusedres.ops.op import Op
from fusedres.ops.rows import (
    channels_last,
    empty_rows,
    launch_reduction,
    launch_rows,
    per_channel,
    pixels,
    reduction_parts,
    storable,
)


def check_slope(slope: Tensor, channels: int, device: torch.device) -> None:
    """Refuse anything but one slope, or one for each channel, in floating point."""
    if not slope.dtype.is_floating_point:
        raise TypeError(f"slope: expected a floating-point tensor, got {slope.dtype}")
    if slope.shape != (1,):
        check_vector("slope", slope, channels)
    if slope.device != device:
        raise ValueError(f"slope: expected it on {device}, got {slope.device}")


def _check(y: Tensor, scale: Tensor, shift: Tensor, slope: Tensor) -> None:
    check_activation("y", y)
    check_vector("scale", scale, y.shape[1])
    check_vector("shift", shift, y.shape[1])
    check_slope(slope, y.shape[1], y.device)


def _bn_prelu(y: Tensor, scale: Tensor, shift: Tensor, slope: Tensor) -> Tensor:
    """z = v where v = y * scale + shift is positive, slope * v elsewhere.

    Args:
        y: (N, C, H, W) raw convolution output.
        scale, shift: (C,) in the statistics dtype (`Normaliser`).
        slope: (C,) or (1,), of any dtype.

    Returns:
        (N, C, H, W), rounded once to the dtype of y.
    """
    v = normalised_sum(y, scale, shift, None, None, None)
    return torch.where(v > 0, v, v * per_channel(slope.to(v.dtype))).to(y.dtype)


bn_prelu = Op(_bn_prelu, check=_check)


@bn_prelu.triton
def _bn_prelu_triton(y: Tensor, scale: Tensor, shift: Tensor, slope: Tensor) -> Tensor:
    if not storable(y, slope):
        return NotImplemented
    from fusedres.kernels.bn_prelu import bn_prelu_kernel

    z = empty_rows(y)
    arguments = {"y_ptr": channels_last(y), "scale_ptr": scale, "shift_ptr": shift, **_slopes(slope), "z_ptr": z}
    reads = ("y_ptr", "scale_ptr", "shift_ptr", "slope_ptr")
    launch_rows(
        bn_prelu_kernel, y, arguments, reads=reads, kind="batch norm", writes=("z_ptr",), flops=4 * y.numel()
    )  # fmt: skip
    return z


@bn_prelu.native
def _bn_prelu_native(y: Tensor, scale: Tensor, shift: Tensor, slope: Tensor) -> Tensor:
    if y.dtype != statistics_dtype(y.dtype):
        return NotImplemented
    return F.prelu(affine(y, scale, shift), slope.to(y.dtype))


def _bn_prelu_backward(
    g: Tensor, y: Tensor, norm: Normaliser, slope: Tensor, gamma: Tensor | None, *, batch_stats: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of y, gamma, beta and the slopes: `bn_backward` of h, and sum(g * min(v, 0)).

    h = g where v = y * scale + shift is positive, slope * g elsewhere.

    Args:
        g: (N, C, H, W) gradient at the output.
        y: (N, C, H, W) raw convolution output.
        norm: the `Normaliser` of the forward pass.
        slope: (C,) or (1,).
        gamma: (C,) or None.
        batch_stats: whether mean and invstd came from this batch (else they are constants).

    Returns:
        dy (N, C, H, W) in the dtype of y; dgamma, dbeta (C,) and dslope of the shape of the slopes in the statistics
        dtype.
    """
    v = normalised_sum(y, norm.scale, norm.shift, None, None, None)
    wide, is_open = g.to(v.dtype), v > 0
    h = torch.where(is_open, wide, wide * per_channel(slope.to(v.dtype)))
    dslope = torch.where(is_open, 0.0, wide * v).sum((0, 2, 3))
    dy, dgamma, dbeta = bn_backward(OutputGrad(h), y, norm, gamma, batch_stats=batch_stats)
    return dy.to(y.dtype), dgamma, dbeta, _shared(dslope, slope)


bn_prelu_backward = Op(_bn_prelu_backward)


@bn_prelu_backward.triton
def _bn_prelu_backward_triton(
    g: Tensor, y: Tensor, norm: Normaliser, slope: Tensor, gamma: Tensor | None, *, batch_stats: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not storable(g, y, slope):
        return NotImplemented
    from fusedres.kernels.bn_prelu import bn_prelu_apply_kernel, bn_prelu_reduce_kernel

    parts = torch.empty((3, reduction_parts(y), y.shape[1]), dtype=torch.float32, device=y.device)
    dy = empty_rows(y)
    operands = {
        "g_ptr": channels_last(g), "y_ptr": channels_last(y), "scale_ptr": norm.scale, "shift_ptr": norm.shift,
        **_slopes(slope),
    }  # fmt: skip
    vectors = ("scale_ptr", "shift_ptr", "slope_ptr", "mean_ptr")
    written = dict(zip(("part_g_ptr", "part_gd_ptr", "part_slope_ptr"), parts.unbind(), strict=True))
    launch_reduction(
        bn_prelu_reduce_kernel, y, {**operands, "mean_ptr": norm.mean, **written}, reads=("g_ptr", "y_ptr", *vectors),
        kind="batch norm", writes=tuple(written), flops=9 * y.numel(),
    )  # fmt: skip
    sums = finished(parts[0], parts[1], pixels(y), norm).sums
    centre = {"q_ptr": sums.q, "r_ptr": sums.r, "mean_ptr": norm.mean}
    launch_rows(
        bn_prelu_apply_kernel, y,
        {**operands, **(centre if batch_stats else dict.fromkeys(centre)), "dy_ptr": dy},
        reads=("g_ptr", "y_ptr", "q_ptr", "r_ptr", *vectors), kind="batch norm", writes=("dy_ptr",),
        flops=(9 if batch_stats else 5) * y.numel(),
    )  # fmt: skip
    return dy, sums.sum_gy, sums.sum_g, _shared(parts[2].sum(0), slope)


def _slopes(slope: Tensor) -> dict[str, Any]:
    return {"slope_ptr": slope, "EACH": slope.shape[0] > 1}


def _shared(dslope: Tensor, slope: Tensor) -> Tensor:
    """The gradient of a single slope is that of all channels."""
    return dslope if dslope.shape == slope.shape else dslope.sum(0, keepdim=True)
