"""What joins a block's output: nothing, its input in one form or another, or a tensor from elsewhere."""

from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor

from fusedres.operands import OutputGrad
from fusedres.ops.zero_pad_shortcut import Added, ZeroPadded, ZeroPaddedGrad, zero_pad_shortcut, zero_pad_size
from fusedres.runtime.holding import Holding

L = TypeVar("L")
Size = tuple[int, ...]


@dataclass(frozen=True)
class Shortcut(Holding):
    """Nothing joins; what others do is told by the same methods."""

    @property
    def name(self) -> str:
        """What an error calls it."""
        return "shortcut"

    def operand_size(self, size: Size, channels: int) -> Size | None:
        """The shape of what joins an output of so many ``channels``, made of an input of ``size``; None: nothing."""
        return None

    def operand(self, x: Tensor, channels: int) -> Tensor | ZeroPadded | None:
        """What the pass at a block's end adds, made of its input ``x``."""
        return None

    def input_grad(self, arriving: OutputGrad, size: Size) -> Added | None:
        """What the gradient at the sum sends to the block's input of ``size``."""
        return None

    def sum_with(self, z: Tensor, x: Tensor) -> Tensor:
        """The sum, of differentiable PyTorch."""
        return z

    def without_tensors(self) -> "Shortcut":
        """As a part of a spec."""
        return self


NO_SHORTCUT = Shortcut()


@dataclass(frozen=True)
class Identity(Shortcut):
    """The input as it is."""

    @property
    def name(self) -> str:
        return "x"

    def operand_size(self, size: Size, channels: int) -> Size:
        return size

    def operand(self, x: Tensor, channels: int) -> Tensor:
        return x

    def input_grad(self, arriving: OutputGrad, size: Size) -> Added:
        return arriving

    def sum_with(self, z: Tensor, x: Tensor) -> Tensor:
        return z + x


@dataclass(frozen=True)
class ZeroPad(Shortcut):
    """Every ``stride``-th pixel of the input, the new channels zero: option A of He et al. 2015."""

    stride: tuple[int, int] = (1, 1)

    def operand_size(self, size: Size, channels: int) -> Size:
        return zero_pad_size(size, channels, self.stride)

    def operand(self, x: Tensor, channels: int) -> ZeroPadded:
        return ZeroPadded(x, channels, self.stride)

    def input_grad(self, arriving: OutputGrad, size: Size) -> Added:
        return ZeroPaddedGrad(arriving, size, self.stride)

    def sum_with(self, z: Tensor, x: Tensor) -> Tensor:
        return z + zero_pad_shortcut(x, z.shape[1], self.stride)


@dataclass(frozen=True)
class Projection(Shortcut, Generic[L]):
    """A layer beside the block's, on the same input, which ``pool`` may average before.

    ``layer`` is a `Layer` with its tensors, or what stands for it: its spec, its size.
    """

    layer: L
    pool: Any = field(default=None, compare=False)

    @property
    def name(self) -> str:
        return "projection"

    def without_tensors(self) -> Shortcut:
        return NO_SHORTCUT  # its layer is told of beside the others


@dataclass(frozen=True)
class Residual(Shortcut):
    """A tensor of its own, (N, K, P, Q); None in a spec."""

    tensor: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        return "residual"

    def operand_size(self, size: Size, channels: int) -> Size | None:
        return None if self.tensor is None else tuple(self.tensor.shape)

    def without_tensors(self) -> Shortcut:
        return Residual()
