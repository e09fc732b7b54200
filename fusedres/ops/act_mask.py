"""What a backward pass tells an activation's slope from, and gradients passed through it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedres.activation import RELU, Activation
from fusedres.operands import OutputGrad
from fusedres.ops.device import device_activation
from fusedres.ops.op import Op
from fusedres.ops.rows import channels_last, empty_rows, launch_rows, storable, word_channels


def pack_relu_mask(z: Tensor, act: Activation = RELU) -> Tensor:
    """The positions where an activation is open, packed along the channels.

    Args:
        z: (N, C, H, W) floating point, its output.
        act: one that has an ``is_open``.

    Returns:
        Where 32 divides C, (C / 32, N, H, W) int32: bit j of word i belongs to channel 32 i + j. Elsewhere
        (N, H, W, ceil(C / 8)) uint8: bit j of byte b belongs to channel 8 b + j; bits past C are zero.
    """
    assert act.is_open is not None
    open_ = act.is_open(z).permute(0, 2, 3, 1)
    open_ = torch.nn.functional.pad(open_, (0, -open_.shape[-1] % 8)).unflatten(-1, (-1, 8))
    weights = 2 ** torch.arange(8, device=z.device, dtype=torch.uint8)
    packed = (open_ * weights).sum(-1, dtype=torch.uint8)
    # Bytes of a word begin with the lowest, on every machine that torch supports.
    return packed.view(torch.int32).permute(3, 0, 1, 2).contiguous() if word_channels(z.shape[1]) == 32 else packed


def unpack_relu_mask(mask: Tensor, channels: int) -> Tensor:
    """The (N, channels, H, W) bool tensor that `pack_relu_mask` packed."""
    packed = mask.permute(1, 2, 3, 0).contiguous().view(torch.uint8) if mask.dtype == torch.int32 else mask
    bits = packed.unsqueeze(-1) >> torch.arange(8, device=mask.device, dtype=torch.uint8)
    return (bits & 1).flatten(-2)[..., :channels].permute(0, 3, 1, 2).bool()


def is_bits(mask: Tensor | None) -> bool:
    """Whether a mask is `pack_relu_mask`'s and not an activation's output or input."""
    return mask is not None and not mask.is_floating_point()


def activated(
    v: Tensor, act: Activation, dtype: torch.dtype, *, bit_mask: bool, scratch: bool = False
) -> tuple[Tensor, Tensor | None]:
    """z = act(v) in ``dtype`` and, if asked for, its mask: bits, or v rounded as z, or None of the identity.

    ``scratch``: whether z may take the place of v.
    """
    z = v.relu_() if scratch and act == RELU else act.value(v).to(dtype)
    if not bit_mask or act.is_identity:
        return z, None
    return z, v.to(dtype) if act.needs_input else pack_relu_mask(z, act)


def _act_backward(g: Tensor, mask: Tensor, act: Activation = RELU, *, scratch: bool = False) -> Tensor:
    """The gradient at an activation's input: g times its slope.

    Args:
        g: (N, C, H, W) gradient at its output.
        mask: a bit mask from `pack_relu_mask`, or (N, C, H, W): its output, or its input if it `needs_input`.
        act: the activation.
        scratch: whether the result may take the place of ``g``.

    Returns:
        (N, C, H, W) in the dtype of ``g``.
    """
    if is_bits(mask):
        return act.through(g, unpack_relu_mask(mask, g.shape[1]))
    return act.gradient(g, mask)


act_backward = Op(_act_backward)


@act_backward.triton
def _act_backward_triton(g: Tensor, mask: Tensor, act: Activation = RELU, *, scratch: bool = False) -> Tensor:
    if not storable(g):
        return NotImplemented
    from fusedres.kernels.act_mask import act_backward_kernel

    out = empty_rows(g)
    arguments = {**gradient(g), **mask_arguments(OutputGrad(g, mask, act=act)), "out_ptr": out}
    reads, writes = ("g_ptr", "mask_ptr"), ("out_ptr",)
    launch_rows(act_backward_kernel, g, arguments, reads=reads, kind="add and ReLU", writes=writes, flops=g.numel())
    return out


def laid_out(tensor: Tensor | None) -> Tensor | None:
    """An activation or a bit mask with a pixel's channels side by side, as kernels go through it."""
    if tensor is None:
        return None
    return tensor.contiguous() if is_bits(tensor) else channels_last(tensor)


def is_pooled(g: Tensor) -> bool:
    """Whether a gradient (N, C, H, W) has one value per image and channel in memory, as global pooling leaves it."""
    return g.shape[2] * g.shape[3] > 1 and g.stride(2) * (g.shape[2] - 1) == g.stride(3) * (g.shape[3] - 1) == 0


def gradient(g: Tensor, layout: Callable[[Tensor], Tensor] = channels_last) -> dict[str, Any]:
    """A gradient as kernels are told of it: in rows of channels, with as many pixels to a row as share its values."""
    if is_pooled(g):
        return {"g_ptr": g[:, :, 0, 0].contiguous(), "image": g.shape[2] * g.shape[3]}
    return {"g_ptr": layout(g), "image": None}


def mask_arguments(grad: OutputGrad | None, prefix: str = "") -> dict[str, Any]:
    """What a gradient is masked by, as kernels are told of it."""
    mask = None if grad is None or grad.act.is_identity else grad.mask
    return {
        f"{prefix}mask_ptr": laid_out(mask), f"{prefix.upper()}ACT": device_activation(grad and grad.act, mask)
    }  # fmt: skip


@act_backward.native
def _act_backward_native(g: Tensor, mask: Tensor, act: Activation = RELU, *, scratch: bool = False) -> Tensor:
    if mask.dtype != g.dtype or act != RELU:
        return NotImplemented
    if scratch:
        masked: Tensor = torch.ops.aten.threshold_backward.grad_input(g, mask, 0, grad_input=g)
        return masked
    return torch.ops.aten.threshold_backward(g, mask, 0)
