"""What the door of every op refuses: tensors that do not fit each other, before anything is computed."""

import torch
from torch import Tensor

from fusedres.operands import ConvInput, Geometry, Producer


def check_activation(
    name: str, tensor: Tensor, channels: int | None = None, *, device: torch.device | None = None
) -> None:
    """Refuse anything but a floating-point (N, C, H, W) tensor, with ``channels`` channels on ``device`` if given."""
    if tensor.dim() != 4:
        raise ValueError(f"{name}: expected a 4-D tensor (N, C, H, W), got shape {tuple(tensor.shape)}")
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    if channels is not None and tensor.shape[1] != channels:
        raise ValueError(f"{name}: expected {channels} channels, got {tensor.shape[1]} in {tuple(tensor.shape)}")
    if device is not None:
        check_device(name, tensor, device)


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Refuse a tensor on another device."""
    if tensor.device != device:
        raise ValueError(f"{name}: expected it on {device}, got {tensor.device}")


def check_producer(producer: Producer) -> None:
    """Refuse an output of another shape or dtype than what was normalised, and a mask of no output."""
    y, out, mask = producer.y, producer.out, producer.mask
    if out is not None and (out.shape != y.shape or out.dtype != y.dtype):
        raise ValueError(
            f"producer.out: expected shape {tuple(y.shape)} in {y.dtype}, got {tuple(out.shape)} in {out.dtype}"
        )
    if out is not None and mask is None and producer.act.needs_input:
        raise ValueError(f"producer.mask: expected the input of {producer.act} beside producer.out, got None")
    if out is None and mask is not None:
        raise ValueError("producer.mask: expected None without producer.out, got a mask")


def check_vector(name: str, vector: Tensor, channels: int, device: torch.device | None = None) -> None:
    """Refuse anything but a (channels,) tensor, on ``device`` if given."""
    if tuple(vector.shape) != (channels,):
        raise ValueError(f"{name}: expected shape ({channels},), got {tuple(vector.shape)}")
    if device is not None:
        check_device(name, vector, device)


def check_conv_shapes(name: str, size: tuple[int, ...], weight: Tensor, geometry: Geometry) -> tuple[int, int]:
    """(P, Q) of a convolution; refuses a ``size`` (N, C, H, W), weight and geometry that do not make one."""
    if weight.dim() != 4:
        raise ValueError(f"weight: expected shape (K, C/groups, R, S), got {tuple(weight.shape)}")
    k, channels, r, s = weight.shape
    groups = geometry.groups
    if groups < 1 or k % groups:
        raise ValueError(f"groups: expected a positive divisor of {k} output channels, got {groups}")
    if size[1] != channels * groups:
        raise ValueError(
            f"{name}: expected {channels * groups} channels for weight {tuple(weight.shape)} "
            f"in {groups} group(s), got {size[1]}"
        )
    if min(geometry.stride) < 1 or min(geometry.dilation) < 1 or min(geometry.padding) < 0:
        raise ValueError(f"stride, padding, dilation: expected positive steps and no negative padding, got {geometry}")
    p, q = geometry.output_size(size[2], size[3], (r, s))
    if p < 1 or q < 1:
        raise ValueError(f"{name}: {size[2]} x {size[3]} pixels are too few for a {r} x {s} kernel with {geometry}")
    return p, q


def check_conv(u: ConvInput, weight: Tensor, geometry: Geometry, *, name: str = "input") -> None:
    """Refuse an input, weight (K, C/groups, R, S) and geometry that do not make a convolution."""
    tensor = u.tensor
    check_activation(name, tensor)
    check_conv_shapes(name, u.size, weight, geometry)
    if tensor.dtype != weight.dtype:
        raise TypeError(f"weight: expected the dtype of {name}, {tensor.dtype}, got {weight.dtype}")
    if tensor.device != weight.device:
        raise ValueError(f"weight: expected the device of {name}, {tensor.device}, got {weight.device}")
