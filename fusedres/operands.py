"""The vocabulary every op speaks: operands, statistics, geometry."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres.activation import RELU, Activation


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


class PixelBlocks(NamedTuple):
    """How an image of few channels is packed for one convolution, so that accesses to it are wide (`space_to_depth`).

    The pixels that a step of the window passes, a block, become one pixel with the channels of all of them. The window
    then moves by one pixel and needs no padding, which is written out, and a row of it is a run of memory. Zeros fill
    the channels up to ``pitch`` and, in the weight, a row to ``run``.

    Attributes:
        size: (C, H, W) of the image.
        window: (R, S) of the convolution.
        stride, padding: its own; it has a single group, and no dilation.
    """

    size: tuple[int, int, int]
    window: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    @property
    def channels(self) -> int:
        """Of a block."""
        return self.size[0] * math.prod(self.stride)

    @property
    def pitch(self) -> int:
        """Elements from one block to the next: whole accesses of 8 bytes and more."""
        return -(-self.channels // 4) * 4

    @property
    def rows(self) -> int:
        """Blocks from the top of the window to its bottom."""
        return -(-self.window[0] // self.stride[0])

    @property
    def run(self) -> int:
        """Elements of a row of the window, whole steps of a contraction."""
        least = -(-self.window[1] // self.stride[1]) * self.pitch
        return -(-least // 64) * 64 if least > 64 else max(16, 1 << (least - 1).bit_length())

    @property
    def output_size(self) -> tuple[int, int]:
        """(P, Q) of the convolution."""
        _, height, width = self.size
        return Geometry(self.stride, self.padding).output_size(height, width, self.window)

    @property
    def packed_size(self) -> tuple[int, int, int]:
        """(C, H, W) of the packed image: every window and every run lies inside."""
        p, q = self.output_size
        return self.pitch, p - 1 + self.rows, q - 1 + -(-self.run // self.pitch)


class ConvInput(NamedTuple):
    """What a convolution consumes: ``tensor``, or act(tensor * scale + shift) formed on load.

    ``tensor`` is (N, C, H, W); ``scale`` and ``shift`` are (C,) in the statistics dtype, or both None. With ``blocks``
    it is such an image packed, and there is neither.
    """

    tensor: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    act: Activation = RELU
    blocks: PixelBlocks | None = None

    @property
    def size(self) -> tuple[int, ...]:
        """(N, C, H, W) of what is consumed."""
        return tuple(self.tensor.shape) if self.blocks is None else (self.tensor.shape[0], *self.blocks.size)


class OutputGrad(NamedTuple):
    """The gradient dy that reaches a convolution's output, formed on load from its parts.

    dy = p * (g times the slope of ``act``) + q * (y - mean) + r; without p, q, r it is the masked g alone.
    ``g`` is (N, K, P, Q). ``mask`` is None (nothing to mask), a bit mask as `pack_relu_mask` makes it, or (N, K, P, Q):
    the activation's output, or its input if it `needs_input`. ``y`` is the raw output; ``p``, ``q``, ``r`` are (K,),
    and ``mean`` too (None is zero): where it is large, q * y + r would be a small difference of large numbers.
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
    act: Activation = RELU


class Partials(NamedTuple):
    """Statistics of T disjoint sets of pixels: how many, their mean, their sum of squared deviations.

    ``counts`` is (T,), ``mean`` and ``m2`` are (T, K), all in the statistics dtype.
    """

    counts: Tensor
    mean: Tensor
    m2: Tensor


class Shared(NamedTuple):
    """That statistics are those of a group of processes.

    ``pixels`` is (1,) in the statistics dtype, how many all have together; ``group`` the `ProcessGroup`; ``absent``:
    this process had no samples, and what it computes on stands for none.
    """

    pixels: Tensor
    group: Any
    absent: bool


class Normaliser(NamedTuple):
    """Batch norm as numbers per channel, each (K,): y * scale + shift = gamma * (y - mean) * invstd + beta.

    ``shared``: mean and invstd are of several processes' pixels; None: of this one's, or frozen.
    """

    mean: Tensor
    invstd: Tensor
    scale: Tensor
    shift: Tensor
    shared: Shared | None = None

    @property
    def vectors(self) -> dict[str, Tensor]:
        """The numbers by name."""
        return {"mean": self.mean, "invstd": self.invstd, "scale": self.scale, "shift": self.shift}


class NormNumbers(NamedTuple):
    """The numbers of one batch norm.

    ``eps`` is added to the variance; ``momentum`` is the weight of the new value in the running statistics;
    ``batch_stats``: it normalises with this batch's statistics (training), not with the running ones. ``group`` is the
    `torch.distributed.ProcessGroup` whose batches are one; None: this process has its own.
    """

    eps: float = 1e-5
    momentum: float = 0.1
    batch_stats: bool = True
    group: Any = None

    @property
    def is_shared(self) -> bool:
        """Whether it normalises with the statistics of several processes."""
        return self.batch_stats and self.group is not None


class Norm(NamedTuple):
    """One batch norm as it is stored: its tensors, each (K,) of any floating-point dtype or None, and its numbers.

    ``gamma`` and ``beta`` are 1 and 0 where they are None; ``bias`` is that of the convolution before it. ``counted``
    is () int64, the batches seen, to be one more where this one is measured; None: nobody counts.
    """

    gamma: Tensor | None = None
    beta: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    bias: Tensor | None = None
    counted: Tensor | None = None
    numbers: NormNumbers = NormNumbers()

    @staticmethod
    def of(tensors: Sequence[Tensor | None], numbers: NormNumbers = NormNumbers()) -> "Norm":  # noqa: B008
        """From its `tensors`, a slice of a flat list perhaps, and its numbers."""
        gamma, beta, running_mean, running_var, bias, counted = tensors
        return Norm(gamma, beta, running_mean, running_var, bias, counted, numbers)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Everything but the numbers."""
        return self[:6]

    @property
    def vectors(self) -> tuple[Tensor | None, ...]:
        """The tensors of one value per channel."""
        return self[:5]

    @property
    def affine(self) -> "Norm":
        """Gamma and beta alone."""
        return Norm(self.gamma, self.beta)


class Layer(NamedTuple):
    """One convolution, the batch norm behind it, and the activation behind that where another layer follows.

    ``weight`` is (K, C/groups, R, S). ``gain`` multiplies what the batch norm gives. ``moments``: the convolution's
    output is never written. ``rounded`` is the weight in the dtype of the contractions, where that is not its own and
    the copy was made already.
    """

    weight: Tensor
    geometry: Geometry = Geometry()
    norm: Norm = Norm()
    gain: float = 1.0
    act: Activation = RELU
    moments: bool = False
    rounded: Tensor | None = None

    @staticmethod
    def bare(weight: Tensor, geometry: Geometry, bias: Tensor | None = None) -> "Layer":
        """A convolution without a batch norm."""
        return Layer(weight, geometry, Norm(bias=bias, numbers=NormNumbers(batch_stats=False)))

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The weight, and the tensors of the batch norm."""
        return (self.weight, *self.norm.tensors)

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """`tensors` without the running statistics, which the next forward pass changes and no backward pass reads."""
        gamma, beta, _, _, bias, _ = self.norm.tensors
        return self.weight, gamma, beta, None, None, bias, None

    @property
    def window(self) -> tuple[int, int]:
        """(R, S)."""
        return self.weight.shape[2], self.weight.shape[3]

    @property
    def gained(self) -> "Layer":
        """The same with the gain in gamma and beta, as autograd sees it."""
        if self.gain == 1:
            return self
        gamma, beta = self.norm.gamma, self.norm.beta
        gamma = self.weight.new_full(self.weight.shape[:1], self.gain) if gamma is None else gamma * self.gain
        norm = self.norm._replace(gamma=gamma, beta=None if beta is None else beta * self.gain)
        return self._replace(norm=norm, gain=1.0)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The weight in a dtype of contractions."""
        if self.rounded is not None and self.rounded.dtype == dtype:
            return self.rounded
        return self.weight.to(dtype)


LAYER_TENSORS, NORM_TENSORS = 7, 6
"""How many `tensors` a `Layer` and a `Norm` have."""


class Producer(NamedTuple):
    """What made a convolution's input: a batch norm and an activation, or the end of a block.

    ``y`` (N, C, H, W) is what the batch norm ``norm`` normalised, raw. The input was act(y * scale + shift); where a
    shortcut was added to it before the activation, ``out`` is the input itself, and ``mask``, unless it is None, the
    bits (`pack_relu_mask`) of where that is open.
    """

    y: Tensor
    norm: Normaliser
    out: Tensor | None = None
    mask: Tensor | None = None
    act: Activation = RELU

    @property
    def output(self) -> ConvInput:
        """What the convolution consumed."""
        if self.out is not None:
            return ConvInput(self.out)
        return ConvInput(self.y, self.norm.scale, self.norm.shift, self.act)


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
