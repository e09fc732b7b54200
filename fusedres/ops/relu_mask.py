"""The ReLU's open positions, a bit for each, and gradients passed through them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .contract import channels_last
from .op import Op
from .rows import empty_rows, launch_rows, storable, word_channels


def pack_relu_mask(z: Tensor) -> Tensor:
    """The positions where a rectified output is positive, packed along the channels.

    Args:
        z: (N, C, H, W) floating point.

    Returns:
        Where 32 divides C, (C / 32, N, H, W) int32: bit j of word i belongs to channel 32 i + j. Elsewhere
        (N, H, W, ceil(C / 8)) uint8: bit j of byte b belongs to channel 8 b + j; bits past C are zero.
    """
    open_ = (z > 0).permute(0, 2, 3, 1)
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
    """Whether a mask is `pack_relu_mask`'s and not the rectified output."""
    return mask is not None and not mask.is_floating_point()


def _relu_backward(g: Tensor, mask: Tensor, *, scratch: bool = False) -> Tensor:
    """g where the ReLU was open, zero elsewhere.

    Args:
        g: (N, C, H, W) gradient at the rectified output.
        mask: a bit mask from `pack_relu_mask`, or the rectified output itself (N, C, H, W).
        scratch: whether the result may take the place of ``g``.

    Returns:
        (N, C, H, W) in the dtype of ``g``.
    """
    open_ = unpack_relu_mask(mask, g.shape[1]) if is_bits(mask) else mask > 0
    return torch.where(open_, g, 0.0)


relu_backward = Op(_relu_backward)


@relu_backward.triton
def _relu_backward_triton(g: Tensor, mask: Tensor, *, scratch: bool = False) -> Tensor:
    if not storable(g):
        return NotImplemented
    from ..kernels.relu_mask import relu_backward_kernel

    out = empty_rows(g)
    arguments = {**gradient(g), "mask_ptr": laid_out(mask), "out_ptr": out}
    reads, writes = ("g_ptr", "mask_ptr"), ("out_ptr",)
    launch_rows(relu_backward_kernel, g, arguments, reads=reads, writes=writes, flops=g.numel())
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


@relu_backward.native
def _relu_backward_native(g: Tensor, mask: Tensor, *, scratch: bool = False) -> Tensor:
    if mask.dtype != g.dtype:
        return NotImplemented
    if scratch:
        masked: Tensor = torch.ops.aten.threshold_backward.grad_input(g, mask, 0, grad_input=g)
        return masked
    return torch.ops.aten.threshold_backward(g, mask, 0)
