"""oneDNN's convolutions on the CPU with what joins them: packed weights, a bias, accumulation in place."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .contract import Geometry


class PackedConv(NamedTuple):
    """A convolution with batch norm folded into it; the weight may be in oneDNN's own layout."""

    weight: Tensor
    shift: Tensor | None
    geometry: Geometry


def runs(tensor: Tensor) -> bool:
    """Whether these calls take operands like ``tensor``: fp32 on a CPU, in a build that has oneDNN."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def fold(weight: Tensor, scale: Tensor) -> Tensor:
    """The weight whose convolution is conv(u, weight) * scale, in the weight's layout."""
    return weight * scale.view(-1, 1, 1, 1)


def pack(conv: PackedConv, size: tuple[int, ...]) -> PackedConv:
    """Lay a weight out once for many calls with inputs of about this ``size`` (N, C, H, W)."""
    stride, padding, dilation, groups = conv.geometry
    reorder: Callable[..., Tensor] = torch._C._nn.mkldnn_reorder_conv2d_weight
    weight = conv.weight.to_mkldnn()
    return conv._replace(weight=reorder(weight, padding, stride, dilation, groups, size))


def conv_act(u: Tensor, conv: PackedConv, residual: Tensor | None = None, act: str | None = None) -> Tensor:
    """act(conv(u) + shift + residual)."""
    z: Tensor = torch.ops.mkldnn._convolution_pointwise(u, *_arguments(conv), "none", [], "")
    if residual is not None:
        # Joined to the product, the addition costs 5 ms more (64 -> 256 channels, 8 x 56 x 56) than behind it.
        z.add_(residual)
    # oneDNN's own ReLU turns NaN into 0, which would hide that a network has diverged.
    return z.relu_() if act == "relu" else z


def conv_onto(total: Tensor, u: Tensor, conv: PackedConv) -> Tensor:
    """total += conv(u) + shift, in the memory of ``total``."""
    torch.ops.mkldnn._convolution_pointwise_.binary(total, u, *_arguments(conv), "add", 1.0, None, [], None)
    return total


def _arguments(conv: PackedConv) -> tuple[object, ...]:
    stride, padding, dilation, groups = conv.geometry
    return conv.weight, conv.shift, padding, stride, dilation, groups


def pointwise(matrix: Tensor, shift: Tensor | None = None) -> PackedConv:
    """u -> u @ matrix^T + shift at every pixel, from a (K, C) matrix."""
    weight = matrix.reshape(*matrix.shape, 1, 1).contiguous(memory_format=torch.channels_last)
    return PackedConv(weight, shift, Geometry())
