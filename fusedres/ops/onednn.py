"""oneDNN's convolutions on the CPU with what joins them: a bias, accumulation in place."""

import torch
from torch import Tensor

from fusedres.operands import Geometry
from fusedres.runtime.torch_private import convolve, convolve_onto


def runs(tensor: Tensor) -> bool:
    """Whether these calls take operands like ``tensor``: fp32 on a CPU, in a build that has oneDNN."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def conv(u: Tensor, weight: Tensor, shift: Tensor | None, geometry: Geometry) -> Tensor:
    """conv(u, weight) + shift; the weight may be in oneDNN's own layout."""
    return convolve(u, *_arguments(weight, shift, geometry))


def conv_onto(total: Tensor, u: Tensor, weight: Tensor) -> Tensor:
    """total += conv(u, weight) of a 1x1 weight, in the memory of ``total``."""
    convolve_onto(total, u, *_arguments(weight, None, Geometry()))
    return total


def _arguments(weight: Tensor, shift: Tensor | None, geometry: Geometry) -> tuple[object, ...]:
    stride, padding, dilation, groups = geometry
    return weight, shift, padding, stride, dilation, groups


def pointwise(matrix: Tensor) -> Tensor:
    """The weight of u -> u @ matrix^T at every pixel, from a (K, C) matrix."""
    return matrix.reshape(*matrix.shape, 1, 1).contiguous(memory_format=torch.channels_last)
