"""Activations as values: what each computes, and what its gradient is told from.

Kernels have the same functions, under the same names, in `fusedres.kernels.activation`; to add one, add it there and
here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Activation:
    """A function of single values between two passes, 0 at 0; equal where its name and its numbers are.

    Attributes:
        name: what users call it.
        numbers: what tells it from others of its name.
        value: the function.
        slope: its derivative, of its input.
        is_open: where its derivative is 1, told from its output as well as from its input; ``closed`` everywhere else.
            None: the derivative has other values too, and is told from the input alone.
        closed: the derivative where it is not open.
        rises: whether it never falls, so that the largest of its values is that of the largest input.
    """

    name: str
    numbers: tuple[float, ...] = ()
    value: Callable[[Tensor], Tensor] = field(kw_only=True, compare=False, repr=False)
    slope: Callable[[Tensor], Tensor] = field(kw_only=True, compare=False, repr=False)
    is_open: Callable[[Tensor], Tensor] | None = field(kw_only=True, default=None, compare=False, repr=False)
    closed: float = field(kw_only=True, default=0.0, compare=False, repr=False)
    rises: bool = field(kw_only=True, default=True, compare=False, repr=False)

    def __str__(self) -> str:
        return self.name + (f"({', '.join(map(str, self.numbers))})" if self.numbers else "")

    @property
    def is_identity(self) -> bool:
        """Whether there is nothing to do, forward or backward."""
        return self.name == "identity"

    @property
    def needs_input(self) -> bool:
        """Whether a backward pass has to be given its input, since neither bits nor the output tell the slope."""
        return self.is_open is None

    def gradient(self, g: Tensor, v: Tensor) -> Tensor:
        """The gradient at its input ``v``, where ``g`` arrives at its output; ``v`` may be the output if `is_open`."""
        if self.is_identity:
            return g
        if self.is_open is None:
            return (g * self.slope(v.to(torch.promote_types(v.dtype, torch.float32)))).to(g.dtype)
        return self.through(g, self.is_open(v))

    def through(self, g: Tensor, open_: Tensor) -> Tensor:
        """The same where it is known whether it was open."""
        return torch.where(open_, g, g * self.closed if self.closed else 0.0)


def _two_slopes(
    name: str, value: Callable[[Tensor], Tensor], is_open: Callable[[Tensor], Tensor], closed: float = 0.0,
    numbers: tuple[float, ...] = (),
) -> Activation:  # fmt: skip
    """An activation whose derivative is 1 or ``closed``."""

    def slope(v: Tensor) -> Tensor:
        return torch.where(is_open(v), torch.ones_like(v), closed)

    return Activation(name, numbers, value=value, slope=slope, is_open=is_open, closed=closed)


@functools.cache
def leaky_relu(slope: float = 0.01) -> Activation:
    """v where that is positive, slope * v elsewhere."""

    def value(v: Tensor) -> Tensor:
        return F.leaky_relu(v, slope)

    if slope > 0:
        return _two_slopes("leaky_relu", value, lambda v: v > 0, slope, (slope,))

    def derivative(v: Tensor) -> Tensor:
        return torch.where(v > 0, torch.ones_like(v), slope)

    # Its output has one sign, or is zero on one side: it does not tell which side that was.
    return Activation("leaky_relu", (slope,), value=value, slope=derivative, rises=slope == 0)


def _silu_slope(v: Tensor) -> Tensor:
    s = torch.sigmoid(v)
    return s * (1 + v * (1 - s))


def _hardswish_slope(v: Tensor) -> Tensor:
    middle = torch.where(v >= 3, 1.0, v / 3 + 0.5)
    return torch.where(v <= -3, 0.0, middle)


IDENTITY = _two_slopes("identity", lambda v: v, lambda v: torch.ones_like(v, dtype=torch.bool))
RELU = _two_slopes("relu", torch.relu, lambda v: v > 0)
RELU6 = _two_slopes("relu6", F.relu6, lambda v: (v > 0) & (v < 6))
SILU = Activation("silu", value=F.silu, slope=_silu_slope, rises=False)
HARDSWISH = Activation("hardswish", value=F.hardswish, slope=_hardswish_slope, rises=False)

NAMED = {act.name: act for act in (IDENTITY, RELU, leaky_relu(), RELU6, SILU, HARDSWISH)}

_OF_MODULES: dict[type[nn.Module], Callable[[Any], Activation]] = {
    nn.Identity: lambda module: IDENTITY,
    nn.ReLU: lambda module: RELU,
    nn.LeakyReLU: lambda module: leaky_relu(float(module.negative_slope)),
    nn.ReLU6: lambda module: RELU6,
    nn.SiLU: lambda module: SILU,
    nn.Hardswish: lambda module: HARDSWISH,
}


def activation_named(act: str | Activation | None) -> Activation:
    """The activation that a user asks for by name; None is the identity.

    Raises:
        ValueError: there is none of that name.
    """
    if isinstance(act, Activation):
        return act
    if act is None:
        return IDENTITY
    if not isinstance(act, str) or act not in NAMED:
        raise ValueError(f"act: expected None or one of {', '.join(map(repr, NAMED))}, got {act!r}")
    return NAMED[act]


def activation_of(module: nn.Module) -> Activation | None:
    """What a module computes, if it is one of PyTorch's own activations (a class derived from one may differ)."""
    read = _OF_MODULES.get(type(module))
    return None if read is None else read(module)


def module_of(act: Activation) -> nn.Module:
    """A module of PyTorch's that computes one of `NAMED`, in place where its gradient does not need its input.

    Raises:
        ValueError: there is none.
    """
    for cls, read in _OF_MODULES.items():
        if read(cls()) == act:
            return cls() if act.is_identity or act.needs_input else cls(inplace=True)
    raise ValueError(f"act: expected one of {', '.join(NAMED)}, got {act}")
