"""Normalise, add the shortcut, activate: the pass over a convolution's output that was written to memory."""

import torch
from torch import Tensor

from fusedres.activation import RELU, Activation
from fusedres.operands import statistics_dtype
from fusedres.ops.act_mask import activated
from fusedres.ops.checks import check_activation, check_vector
from fusedres.ops.device import device_activation
from fusedres.ops.op import Op
from fusedres.ops.rows import empty_mask, empty_rows, launch_rows, per_channel, pitch_of, row_layout, storable
from fusedres.ops.zero_pad_shortcut import (
    ZeroPadded,
    add_shortcut,
    residual_arguments,
    residual_read,
    shortcut_input,
    shortcut_tensor,
    zero_pad_shortcut,
)


def _check(
    y: Tensor, scale: Tensor, shift: Tensor, *, residual: Tensor | ZeroPadded | None = None, act: Activation = RELU,
    **others: object,
) -> None:  # fmt: skip
    check_activation("y", y)
    check_vector("scale", scale, y.shape[1])
    check_vector("shift", shift, y.shape[1])
    if residual is not None and residual.shape != y.shape:
        raise ValueError(f"residual: expected the shape of y, {tuple(y.shape)}, got {tuple(residual.shape)}")
    check_act(act)


def check_act(act: Activation) -> None:
    """Refuse an activation that no op has."""
    if not isinstance(act, Activation):
        raise TypeError(f"act: expected an Activation, got {act!r}")


def normalised_sum(
    y: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | ZeroPadded | None,
    residual_scale: Tensor | None, residual_shift: Tensor | None,
) -> Tensor:  # fmt: skip
    """y * scale + shift + residual * residual_scale + residual_shift, unrounded in the statistics dtype."""
    z = y.to(statistics_dtype(y.dtype))
    if scale is not None:
        z = z * per_channel(scale)
    if shift is not None:
        z = z + per_channel(shift)
    residual = shortcut_tensor(residual)
    if residual is not None:
        branch = residual.to(z.dtype)
        if residual_scale is not None:
            branch = branch * per_channel(residual_scale)
        if residual_shift is not None:
            branch = branch + per_channel(residual_shift)
        z = z + branch
    return z


def output_dtype(y: Tensor, residual: Tensor | ZeroPadded | None, residual_scale: Tensor | None) -> torch.dtype:
    """A shortcut that arrives as it is promotes the sum, as in ``out + identity``; a normalised one does not."""
    if residual is None or residual_scale is not None:
        return y.dtype
    return torch.promote_types(y.dtype, residual.dtype)


def _bn_act(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    residual: Tensor | ZeroPadded | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    act: Activation = RELU,
    bit_mask: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """z = act(y * scale + shift + residual), the residual itself optionally * residual_scale + residual_shift.

    Args:
        y: (N, C, H, W) raw convolution output.
        scale, shift: (C,) in the statistics dtype (`Normaliser`).
        residual: (N, C, H, W), a `ZeroPadded` of that shape, or None.
        residual_scale, residual_shift: (C,) when the residual is a raw projection, else None.
        act: the activation.
        bit_mask: whether to return what a backward pass tells its slope from too.

    Returns:
        z (N, C, H, W), rounded once to the storage dtype, and its mask (`activated`) or None.
    """
    v = normalised_sum(y, scale, shift, residual, residual_scale, residual_shift)
    return activated(v, act, output_dtype(y, residual, residual_scale), bit_mask=bit_mask)


bn_act = Op(_bn_act, check=_check)


@bn_act.triton
def _bn_act_triton(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    residual: Tensor | ZeroPadded | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    act: Activation = RELU,
    bit_mask: bool = False,
) -> tuple[Tensor, Tensor | None]:
    if not storable(y, shortcut_input(residual)):
        return NotImplemented
    z = empty_rows(y, output_dtype(y, residual, residual_scale))
    return launch_bn_act(y, (scale, shift), residual, (residual_scale, residual_shift), z, act, bit_mask)


def launch_bn_act(
    y: Tensor, numbers: tuple[Tensor | None, Tensor | None], residual: Tensor | ZeroPadded | None,
    residual_numbers: tuple[Tensor | None, Tensor | None], z: Tensor, act: Activation, bit_mask: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Fill ``z`` and, if asked for, its mask; ``numbers`` are a scale and a shift each, or None."""
    from fusedres.kernels.bn_act import bn_act_kernel

    rows, mask = row_layout(y), empty_mask(z, act) if bit_mask else None
    arguments = {
        "y_ptr": rows, "y_row": pitch_of(rows), "scale_ptr": numbers[0], "shift_ptr": numbers[1],
        **residual_arguments(residual, z.shape), "P": z.shape[2], "Q": z.shape[3],
        "residual_scale_ptr": residual_numbers[0], "residual_shift_ptr": residual_numbers[1],
        "z_ptr": z, "mask_ptr": mask, "ACT": device_activation(act),
    }  # fmt: skip
    reads = ("y_ptr", "scale_ptr", "shift_ptr", "residual_ptr", "residual_scale_ptr", "residual_shift_ptr")
    per_value = 2 * (numbers[0] is not None) + (residual is not None) + 2 * (residual_numbers[0] is not None)
    per_value += not act.is_identity
    launch_rows(
        bn_act_kernel, z, arguments, reads=reads,
        kind="batch norm", writes=("z_ptr", "mask_ptr"), flops=per_value * z.numel(),
        partial=residual_read(residual), all_registers=True,
    )  # fmt: skip
    return z, mask


@bn_act.native
def _bn_act_native(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    residual: Tensor | ZeroPadded | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    act: Activation = RELU,
    bit_mask: bool = False,
) -> tuple[Tensor, Tensor | None]:
    # Two roundings in 16 bits where the formula has one, so only where storage is as wide as statistics.
    if y.dtype != statistics_dtype(y.dtype) or output_dtype(y, residual, residual_scale) != y.dtype:
        return NotImplemented
    z = affine(y, scale, shift)
    if residual is not None:
        if residual_scale is not None and residual_shift is not None:
            wide = residual if isinstance(residual, Tensor) else zero_pad_shortcut(*residual)
            residual = affine(wide, residual_scale, residual_shift)
        add_shortcut(z, residual)
    return activated(z, act, z.dtype, bit_mask=bit_mask, scratch=True)


def affine(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """y * scale + shift by the inference form of batch norm, one pass on every device."""
    zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
    out: Tensor = torch.ops.aten.native_batch_norm(y, scale, shift, zeros, ones, False, 0.0, 0.0)[0]
    return out
