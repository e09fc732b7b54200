"""Activations as values: what each computes, and what its gradient is told from.

Kernels have the same functions, under the same names, in `fusedres.kernels.activation`; to add one, add it there and
here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
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


_TANH_SCALE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715


def _gelu_slope(v: Tensor) -> Tensor:
    return (1 + torch.erf(v * math.sqrt(0.5))) / 2 + v * torch.exp(-v * v / 2) / math.sqrt(2 * math.pi)


def _gelu_tanh_slope(v: Tensor) -> Tensor:
    s = torch.sigmoid(2 * _TANH_SCALE * (v + _TANH_CUBE * v**3))
    return s + v * s * (1 - s) * 2 * _TANH_SCALE * (1 + 3 * _TANH_CUBE * v * v)


def _mish_slope(v: Tensor) -> Tensor:
    t = torch.tanh(F.softplus(v))
    return t + v * (1 - t * t) * torch.sigmoid(v)


@functools.cache
def elu(alpha: float = 1.0) -> Activation:
    """v where that is positive, alpha * (exp(v) - 1) elsewhere."""

    def slope(v: Tensor) -> Tensor:
        return torch.where(v > 0, torch.ones_like(v), alpha * torch.exp(v))

    return Activation("elu", (alpha,), value=lambda v: F.elu(v, alpha), slope=slope, rises=alpha >= 0)


IDENTITY = _two_slopes("identity", lambda v: v, lambda v: torch.ones_like(v, dtype=torch.bool))
RELU = _two_slopes("relu", torch.relu, lambda v: v > 0)
RELU6 = _two_slopes("relu6", F.relu6, lambda v: (v > 0) & (v < 6))
SILU = Activation("silu", value=F.silu, slope=_silu_slope, rises=False)
HARDSWISH = Activation("hardswish", value=F.hardswish, slope=_hardswish_slope, rises=False)
GELU = Activation("gelu", value=F.gelu, slope=_gelu_slope, rises=False)
GELU_TANH = Activation(
    "gelu_tanh", value=lambda v: F.gelu(v, approximate="tanh"), slope=_gelu_tanh_slope, rises=False
)  # fmt: skip
MISH = Activation("mish", value=F.mish, slope=_mish_slope, rises=False)

NAMED = {
    act.name: act for act in (IDENTITY, RELU, leaky_relu(), RELU6, SILU, HARDSWISH, GELU, GELU_TANH, MISH, elu())
}  # fmt: skip

_OF_MODULES: dict[type[nn.Module], Callable[[Any], Activation]] = {
    nn.Identity: lambda module: IDENTITY,
    nn.ReLU: lambda module: RELU,
    nn.LeakyReLU: lambda module: leaky_relu(float(module.negative_slope)),
    nn.ReLU6: lambda module: RELU6,
    nn.SiLU: lambda module: SILU,
    nn.Hardswish: lambda module: HARDSWISH,
    nn.GELU: lambda module: _gelu(module.approximate),
    nn.Mish: lambda module: MISH,
    nn.ELU: lambda module: elu(float(module.alpha)),
}


MODULES = tuple(_OF_MODULES)
"""PyTorch's modules that compute one, an Identity among them."""


def _gelu(approximate: str = "none") -> Activation:
    return GELU_TANH if approximate == "tanh" else GELU


# Each takes what its function takes behind the tensor; functions stand beside their names as methods.
_OF_FUNCTIONS: dict[Any, Callable[..., Activation]] = {
    **dict.fromkeys((torch.relu, torch.relu_, "relu", "relu_"), lambda: RELU),
    F.relu: lambda inplace=False: RELU,
    F.relu6: lambda inplace=False: RELU6,
    F.leaky_relu: lambda negative_slope=0.01, inplace=False: leaky_relu(float(negative_slope)),
    F.leaky_relu_: lambda negative_slope=0.01: leaky_relu(float(negative_slope)),
    F.silu: lambda inplace=False: SILU,
    F.hardswish: lambda inplace=False: HARDSWISH,
    F.gelu: lambda *, approximate="none": _gelu(approximate),
    F.mish: lambda inplace=False: MISH,
    F.elu: lambda alpha=1.0, inplace=False: elu(float(alpha)),
    F.elu_: lambda alpha=1.0: elu(float(alpha)),
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


def activation_told(name: str, numbers: tuple[float, ...] = ()) -> Activation:
    """The activation of a name and its numbers.

    Raises:
        ValueError: there is none.
    """
    made = _OF_NUMBERS.get(name)
    return made(*numbers) if made is not None and numbers else activation_named(name)


_OF_NUMBERS: dict[str, Callable[..., Activation]] = {"leaky_relu": leaky_relu, "elu": elu}


def activation_of(module: nn.Module) -> Activation | None:
    """What a module computes, if it is one of PyTorch's own activations (a class derived from one may differ)."""
    read = _OF_MODULES.get(type(module))
    return None if read is None else read(module)


def activation_of_function(
    function: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Activation | None:
    """What a call of one of PyTorch's functions computes, or of a method by its name.

    ``args`` and ``kwargs`` are those behind the tensor. None: it is no activation, or its numbers are not known yet.
    """
    kwargs = kwargs or {}
    read = _OF_FUNCTIONS.get(function) if isinstance(function, Hashable) else None
    if read is None or not all(isinstance(value, bool | int | float | str) for value in (*args, *kwargs.values())):
        return None
    try:
        return read(*args, **kwargs)
    except TypeError:  # the function itself would refuse these arguments
        return None


def module_of(act: Activation) -> nn.Module:
    """A module of PyTorch's that computes one of `NAMED`, in place where its gradient does not need its input.

    Raises:
        ValueError: there is none.
    """
    if act == GELU_TANH:
        return nn.GELU(approximate="tanh")
    for cls, read in _OF_MODULES.items():
        if read(cls()) == act:
            return cls() if act.is_identity or act.needs_input else cls(inplace=True)
    raise ValueError(f"act: expected one of {', '.join(NAMED)}, got {act}")
