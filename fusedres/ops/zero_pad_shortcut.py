"""The parameter-free shortcut (option A of He et al. 2015): every stride-th pixel, new channels zero.

Ops take it, and its gradient, as operands that are described and not written to memory.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fusedres.operands import OutputGrad
from fusedres.ops.act_mask import is_bits, is_pooled
from fusedres.ops.checks import check_activation
from fusedres.ops.rows import channels_last
from fusedres.plan.tiles import alignment


class ZeroPadded(NamedTuple):
    """What `zero_pad_shortcut` makes of ``x`` (N, C, H, W), as an operand."""

    x: Tensor
    channels: int
    stride: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return zero_pad_size(tuple(self.x.shape), self.channels, self.stride)

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def read(self) -> int:
        """Bytes of the pixels of x that it looks at."""
        n, _, p, q = self.shape
        return n * p * q * self.x.shape[1] * self.x.element_size()


class ZeroPaddedGrad(NamedTuple):
    """What `zero_pad_shortcut_grad` makes of a gradient at the shortcut's output, as an operand.

    ``grad`` is (N, C', P, Q), masked on load; ``size`` is (N, C, H, W) of the shortcut's input.
    """

    grad: OutputGrad
    size: tuple[int, ...]
    stride: tuple[int, int]

    @property
    def g(self) -> Tensor:
        return self.grad.g

    @property
    def places(self) -> slice:
        """The channels of the gradient that are those of the shortcut's input."""
        before, _ = margins(self.size[1], self.g.shape[1])
        return slice(before, before + self.size[1])


Added = OutputGrad | ZeroPaddedGrad
"""A gradient of an op's input from elsewhere, which the op adds to its own."""


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
    before, after = margins(x.shape[1], channels)
    return channels_last(pad(x[:, :, :: stride[0], :: stride[1]], (0, 0, 0, 0, before, after)))


def zero_pad_shortcut_grad(g: Tensor, size: tuple[int, ...], stride: tuple[int, int]) -> Tensor:
    """The gradient at x (``size``) of `zero_pad_shortcut`, from the gradient ``g`` at its output."""
    before, _ = margins(size[1], g.shape[1])
    dx = torch.zeros(size, dtype=g.dtype, device=g.device).contiguous(memory_format=torch.channels_last)
    dx[:, :, :: stride[0], :: stride[1]] = g[:, before : before + size[1]]
    return dx


def zero_pad_size(size: tuple[int, ...], channels: int, stride: tuple[int, int]) -> tuple[int, ...]:
    """The shape of `zero_pad_shortcut`'s output for an x of ``size``."""
    margins(size[1], channels)
    return size[0], channels, -(-size[2] // stride[0]), -(-size[3] // stride[1])


def margins(channels: int, wanted: int) -> tuple[int, int]:
    """Zero channels before and behind the ``channels`` of x."""
    if wanted < channels:
        raise ValueError(f"channels: expected at least the {channels} of x, got {wanted}")
    before = (wanted - channels) // 2
    return before, wanted - channels - before


def shortcut_input(residual: Tensor | ZeroPadded | None) -> Tensor | None:
    """The tensor that takes a shortcut."""
    return residual.x if isinstance(residual, ZeroPadded) else residual


def shortcut_tensor(residual: Tensor | ZeroPadded | None) -> Tensor | None:
    """A shortcut as a tensor."""
    return zero_pad_shortcut(*residual) if isinstance(residual, ZeroPadded) else residual


def add_shortcut(z: Tensor, residual: Tensor | ZeroPadded) -> None:
    """z += residual, where it is not zero."""
    if isinstance(residual, ZeroPadded):
        x, (before, _) = residual.x, margins(residual.x.shape[1], z.shape[1])
        z[:, before : before + x.shape[1]].add_(x[:, :, :: residual.stride[0], :: residual.stride[1]])
    else:
        z.add_(residual)


def residual_arguments(residual: Tensor | ZeroPadded | None, size: tuple[int, ...]) -> dict[str, Any]:
    """A shortcut that joins at an output of ``size`` (N, K, P, Q), as kernels are told of it."""
    names = ("residual_C", "residual_H", "residual_W", "residual_stride_h", "residual_stride_w")
    if not isinstance(residual, ZeroPadded):
        plain = None if residual is None else channels_last(residual)
        return {"residual_ptr": plain, **dict.fromkeys(names, 1), "RESIDUAL_FIRST": None, "RESIDUAL_MULTIPLE": 1}
    c, h, w = residual.x.shape[1:]
    before, _ = margins(c, size[1])
    return {
        "residual_ptr": channels_last(residual.x), **dict(zip(names, (c, h, w, *residual.stride), strict=True)),
        "RESIDUAL_FIRST": before, "RESIDUAL_MULTIPLE": alignment(c),
    }  # fmt: skip


def residual_read(residual: Tensor | ZeroPadded | None) -> dict[str, int]:
    """What kernels read of a shortcut that they do not read whole, by argument."""
    return {"residual_ptr": residual.read} if isinstance(residual, ZeroPadded) else {}


def added_geometry(add: Added | None) -> dict[str, Any]:
    """Where in a gradient from elsewhere the pixels and channels of an op's input are, as kernels are told of it."""
    names = ("add_C", "add_P", "add_Q", "add_stride_h", "add_stride_w")
    if not isinstance(add, ZeroPaddedGrad):
        return {**dict.fromkeys(names, 1), "ADD_FIRST": None, "ADD_MULTIPLE": 1}
    channels, p, q = add.g.shape[1:]
    return {
        **dict(zip(names, (channels, p, q, *add.stride), strict=True)),
        "ADD_FIRST": add.places.start, "ADD_MULTIPLE": alignment(channels),
    }  # fmt: skip


def added_read(add: Added | None, grad: OutputGrad | None) -> dict[str, int]:
    """What kernels read of a gradient from elsewhere, given as ``grad``, that they do not read whole, by argument."""
    if not isinstance(add, ZeroPaddedGrad) or grad is None:
        return {}
    g, mask, places = grad.g, grad.mask, add.places
    n, _, p, q = g.shape
    read = {"add_ptr": (n if is_pooled(g) else n * p * q) * add.size[1] * g.element_size()}
    if mask is not None:
        channels = 8 * mask.element_size() if is_bits(mask) else 1
        words = -(-places.stop // channels) - places.start // channels
        read["add_mask_ptr"] = n * p * q * words * mask.element_size()
    return read
