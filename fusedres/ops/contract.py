"""The vocabulary every op speaks (operands, statistics, geometry) and the checks at its door."""

from typing import NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """How a convolution's window moves: (vertical, horizontal) pairs in pixels, and channel groups."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output_size(self, height: int, width: int, kernel: tuple[int, int]) -> tuple[int, int]:
        """(P, Q) for an input of ``height`` x ``width`` pixels and an R x S ``kernel``."""
        extents = zip((height, width), kernel, self.stride, self.padding, self.dilation, strict=True)
        p, q = ((size + 2 * pad - dilation * (k - 1) - 1) // stride + 1 for size, k, stride, pad, dilation in extents)
        return p, q


class PoolGeometry(NamedTuple):
    """A max-pooling window: (vertical, horizontal) pairs in pixels."""

    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (2, 2)
    padding: tuple[int, int] = (1, 1)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        return Geometry(self.stride, self.padding).output_size(height, width, self.kernel)


class ConvInput(NamedTuple):
    """What a convolution consumes: ``tensor``, or relu(tensor * scale + shift) formed on load.

    ``tensor`` is (N, C, H, W); ``scale`` and ``shift`` are (C,) in the statistics dtype, or both None.
    """

    tensor: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None


class OutputGrad(NamedTuple):
    """The gradient dy that reaches a convolution's output, formed on load from its parts.

    dy = p * (g where the ReLU was open, else 0) + q * (y - mean) + r; without p, q, r it is the masked g alone.
    ``g`` is (N, K, P, Q). ``mask`` is None (nothing to mask), a bit mask as `pack_relu_mask` makes it, or the
    rectified output itself (N, K, P, Q). ``y`` is the raw output; ``p``, ``q``, ``r`` are (K,), and
    ``mean`` too (None is zero): where it is large, q * y + r would be a small difference of large numbers.
    ``scratch`` says that nobody needs ``g`` afterwards, so that its memory may be written to.
    """

    g: Tensor
    mask: Tensor | None = None
    y: Tensor | None = None
    p: Tensor | None = None
    q: Tensor | None = None
    r: Tensor | None = None
    mean: Tensor | None = None
    scratch: bool = False


class Partials(NamedTuple):
    """Statistics of T disjoint sets of pixels: how many, their mean, their sum of squared deviations.

    ``counts`` is (T,), ``mean`` and ``m2`` are (T, K), all in the statistics dtype.
    """

    counts: Tensor
    mean: Tensor
    m2: Tensor


class Normaliser(NamedTuple):
    """Batch norm as numbers per channel, each (K,): y * scale + shift = gamma * (y - mean) * invstd + beta."""

    mean: Tensor
    invstd: Tensor
    scale: Tensor
    shift: Tensor


class RunningNorm(NamedTuple):
    """A batch norm in evaluation, as it is stored: its numbers are formed where they are used, and kept nowhere.

    ``mean`` and ``var`` are the running statistics; ``gamma``, ``beta`` and the ``bias`` of the convolution before it
    may be None (1, 0 and 0). All are (K,), of any floating-point dtype.
    """

    mean: Tensor
    var: Tensor
    gamma: Tensor | None = None
    beta: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5


class Producer(NamedTuple):
    """What made a convolution's input: a batch norm and a ReLU, or the end of a block.

    ``y`` (N, C, H, W) is what the batch norm ``norm`` normalised, raw. The input was relu(y * scale + shift); where a
    shortcut was added to it before the ReLU, ``out`` is the input itself, and ``mask``, unless it is None, the bits
    (`pack_relu_mask`) of where that is positive.
    """

    y: Tensor
    norm: Normaliser
    out: Tensor | None = None
    mask: Tensor | None = None

    @property
    def output(self) -> ConvInput:
        """What the convolution consumed."""
        if self.out is not None:
            return ConvInput(self.out)
        return ConvInput(self.y, self.norm.scale, self.norm.shift)


class Moments(NamedTuple):
    """First two moments of a 1x1 convolution's input over n pixels.

    ``mean`` is (C,) and ``m2`` is the centred Gram matrix (C, C): sum over pixels of (u - mean)(u - mean)^T.
    """

    pixels: int
    mean: Tensor
    m2: Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for every storage dtype, fp64 for fp64 (which only checks of the algebra use)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_channel(vector: Tensor) -> Tensor:
    """A (C,) vector shaped to broadcast over (N, C, H, W)."""
    return vector.view(1, -1, 1, 1)


def channels_last(tensor: Tensor) -> Tensor:
    """``tensor`` (N, C, H, W) with its channels contiguous; itself when they are."""
    return tensor.contiguous(memory_format=torch.channels_last)


def pixels(tensor: Tensor) -> int:
    """Pixels per channel of an (N, C, H, W) tensor."""
    return tensor.shape[0] * tensor.shape[2] * tensor.shape[3]


def as_rows(tensor: Tensor) -> Tensor:
    """(N, C, H, W) as (N*H*W, C) rows of pixels: a view when the tensor is channels_last."""
    return tensor.permute(0, 2, 3, 1).reshape(-1, tensor.shape[1])


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """(N*H*W, C) rows as a channels_last (N, C, H, W) view, with N, H, W of ``like``."""
    n, _, h, w = like.shape
    return rows.view(n, h, w, rows.shape[1]).permute(0, 3, 1, 2)


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
    """Refuse an output of another shape or dtype than what was normalised, and bits of no output."""
    y, _, out, mask = producer
    if out is not None and (out.shape != y.shape or out.dtype != y.dtype):
        raise ValueError(
            f"producer.out: expected shape {tuple(y.shape)} in {y.dtype}, got {tuple(out.shape)} in {out.dtype}"
        )
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


def check_conv(tensor: Tensor, weight: Tensor, geometry: Geometry, *, name: str = "input") -> None:
    """Refuse an input, weight (K, C/groups, R, S) and geometry that do not make a convolution."""
    check_activation(name, tensor)
    check_conv_shapes(name, tuple(tensor.shape), weight, geometry)
    if tensor.dtype != weight.dtype:
        raise TypeError(f"weight: expected the dtype of {name}, {tensor.dtype}, got {weight.dtype}")
    if tensor.device != weight.device:
        raise ValueError(f"weight: expected the device of {name}, {tensor.device}, got {weight.device}")
