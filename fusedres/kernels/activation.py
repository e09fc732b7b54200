"""Activations inside of kernels: the same as those of `fusedres.activation`, under the same names.

A kernel is given one as a compile-time value, `Activation`. Its functions take it as their last argument, so that they
find their numbers there; kernels call them by the helpers at the end of this file.
"""

import functools
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl


@dataclass(frozen=True, repr=False)
class Activation:
    """What a kernel is told of an activation.

    Attributes:
        name, numbers: those of the host's.
        of: (v, ACT) -> its value of fp32 v, which keeps a NaN and is 0 at 0.
        slope: (v, ACT) -> its derivative at fp32 v; None where ``is_open`` says it, and of the identity.
        is_open: (v, ACT) -> where its derivative is 1, from its input or its output, in any dtype; None where it has
            other values than that and ``closed``.
        closed: the derivative where it is not open.
        ends_at_zero: whether it is 0 wherever its input is not positive.
    """

    name: str
    numbers: tuple[float, ...]
    of: Any
    slope: Any = None
    is_open: Any = None
    closed: float = 0.0
    ends_at_zero: bool = False

    def __repr__(self) -> str:
        return self.name + (f"({', '.join(map(str, self.numbers))})" if self.numbers else "")

    @property
    def is_identity(self) -> bool:
        return self.name == "identity"

    @property
    def cache_key(self) -> str:
        """What Triton's cache tells binaries by: sources too."""
        functions = (self.of, self.slope, self.is_open)
        return f"{self!r}-{self.closed}-" + "-".join(f.cache_key for f in functions if f is not None)


@triton.jit
def _identity(v, ACT: tl.constexpr):
    return v


@triton.jit
def _relu(v, ACT: tl.constexpr):
    return tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _is_positive(v, ACT: tl.constexpr):
    return v > 0


@triton.jit
def _leaky_relu(v, ACT: tl.constexpr):
    return tl.where(v > 0, v, v * ACT.numbers[0])


@triton.jit
def _leaky_relu_slope(v, ACT: tl.constexpr):
    return tl.where(v > 0, 1.0, ACT.numbers[0])


@triton.jit
def _relu6(v, ACT: tl.constexpr):
    v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, 6.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _is_inside(v, ACT: tl.constexpr):
    return (v > 0) & (v < 6)


@triton.jit
def _silu(v, ACT: tl.constexpr):
    return v / (1.0 + tl.exp(-v))


@triton.jit
def _silu_slope(v, ACT: tl.constexpr):
    s = 1.0 / (1.0 + tl.exp(-v))
    return s * (1.0 + v * (1.0 - s))


@triton.jit
def _hardswish(v, ACT: tl.constexpr):
    inner = tl.maximum(v + 3.0, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return v * tl.minimum(inner, 6.0, propagate_nan=tl.PropagateNan.ALL) / 6.0


@triton.jit
def _hardswish_slope(v, ACT: tl.constexpr):
    return tl.where(v <= -3.0, 0.0, tl.where(v >= 3.0, 1.0, v / 3.0 + 0.5))


@triton.jit
def _gelu(v, ACT: tl.constexpr):
    return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))


@triton.jit
def _gelu_slope(v, ACT: tl.constexpr):
    return 0.5 * (1.0 + tl.erf(v * 0.7071067811865476)) + v * tl.exp(-0.5 * v * v) * 0.3989422804014327


@triton.jit
def _gelu_tanh_share(v):
    """(1 + tanh(w)) / 2 is the sigmoid of 2w."""
    return 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (v + 0.044715 * v * v * v)))


@triton.jit
def _gelu_tanh(v, ACT: tl.constexpr):
    return v * _gelu_tanh_share(v)


@triton.jit
def _gelu_tanh_slope(v, ACT: tl.constexpr):
    s = _gelu_tanh_share(v)
    return s + v * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * v * v)


@triton.jit
def _mish_share(v):
    """tanh(log(1 + exp(v))), as a ratio of polynomials in whichever of exp(v) and exp(-v) is small."""
    e = tl.exp(-tl.abs(v))
    above = tl.where(v > 0, 1.0 + 2.0 * e, e * (e + 2.0))
    return above / (above + tl.where(v > 0, 2.0 * e * e, 2.0))


@triton.jit
def _mish(v, ACT: tl.constexpr):
    return v * _mish_share(v)


@triton.jit
def _mish_slope(v, ACT: tl.constexpr):
    t = _mish_share(v)
    return t + v * (1.0 - t * t) / (1.0 + tl.exp(-v))


@triton.jit
def _elu(v, ACT: tl.constexpr):
    return tl.where(v > 0, v, ACT.numbers[0] * (tl.exp(v) - 1.0))


@triton.jit
def _elu_slope(v, ACT: tl.constexpr):
    return tl.where(v > 0, 1.0, ACT.numbers[0] * tl.exp(v))


@functools.cache
def named(name: str, numbers: tuple[float, ...] = ()) -> Activation:
    """The activation of this name and these numbers."""
    if name == "leaky_relu" and numbers[0] > 0:
        return Activation(name, numbers, _leaky_relu, is_open=_is_positive, closed=numbers[0])
    return {
        "identity": Activation("identity", (), _identity),
        "relu": Activation("relu", (), _relu, is_open=_is_positive, ends_at_zero=True),
        "leaky_relu": Activation("leaky_relu", numbers, _leaky_relu, _leaky_relu_slope),
        "relu6": Activation("relu6", (), _relu6, is_open=_is_inside, ends_at_zero=True),
        "silu": Activation("silu", (), _silu, _silu_slope),
        "hardswish": Activation("hardswish", (), _hardswish, _hardswish_slope),
        "gelu": Activation("gelu", (), _gelu, _gelu_slope),
        "gelu_tanh": Activation("gelu_tanh", (), _gelu_tanh, _gelu_tanh_slope),
        "mish": Activation("mish", (), _mish, _mish_slope),
        "elu": Activation("elu", numbers, _elu, _elu_slope),
    }[name]


@triton.jit
def activated(v, ACT: tl.constexpr):
    """The activation of fp32 v."""
    return ACT.of(v, ACT)


@triton.jit
def opening(v, ACT: tl.constexpr):
    """What a gradient is passed through by `behind`: where the activation is open, or its slope at its input v.

    v may be the output where the activation has an ``is_open``.
    """
    if ACT.is_open is not None:
        v = ACT.is_open(v, ACT)
    elif not ACT.is_identity:
        v = ACT.slope(v.to(tl.float32), ACT)
    return v


@triton.jit
def behind(
    g,  # gradient at an activation's output, fp32 or storage dtype
    open_,  # as `opening` gives it, or bits of the same
    ACT: tl.constexpr,
):
    """The gradient at the activation's input, in the dtype of g."""
    if ACT.is_identity:
        return g
    if ACT.is_open is None:
        g = (g.to(tl.float32) * open_).to(g.dtype)
    elif ACT.closed == 0.0:
        g = tl.where(open_, g, 0.0)
    else:
        g = tl.where(open_, g, (g.to(tl.float32) * ACT.closed).to(g.dtype))
    return g
