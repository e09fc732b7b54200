"""The parameter-free shortcut (option A of He et al. 2015): every stride-th pixel, new channels zero."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .contract import channels_last, check_activation


def zero_pad_shortcut(x: Tensor, channels: int, stride: tuple[int, int]) -> Tensor:
    """x at every stride-th pixel, its C channels in the middle of ``channels``, the others zero.

    Args:
        x: (N, C, H, W).
        channels: C' >= C of the output; with an odd difference the extra channel is behind.
        stride: (vertical, horizontal).

    Returns:
        (N, C', ceil(H / stride), ceil(W / stride)) channels_last.
    """
    check_activation("x", x)
    before, after = _margins(x.shape[1], channels)
    return channels_last(pad(x[:, :, :: stride[0], :: stride[1]], (0, 0, 0, 0, before, after)))


def zero_pad_shortcut_grad(g: Tensor, size: tuple[int, ...], stride: tuple[int, int]) -> Tensor:
    """The gradient at x (``size``) of `zero_pad_shortcut`, from the gradient ``g`` at its output."""
    before, _ = _margins(size[1], g.shape[1])
    dx = torch.zeros(size, dtype=g.dtype, device=g.device).contiguous(memory_format=torch.channels_last)
    dx[:, :, :: stride[0], :: stride[1]] = g[:, before : before + size[1]]
    return dx


def zero_pad_size(size: tuple[int, ...], channels: int, stride: tuple[int, int]) -> tuple[int, ...]:
    """The shape of `zero_pad_shortcut`'s output for an x of ``size``."""
    _margins(size[1], channels)
    return size[0], channels, -(-size[2] // stride[0]), -(-size[3] // stride[1])


def _margins(channels: int, wanted: int) -> tuple[int, int]:
    if wanted < channels:
        raise ValueError(f"channels: expected at least the {channels} of x, got {wanted}")
    before = (wanted - channels) // 2
    return before, wanted - channels - before
