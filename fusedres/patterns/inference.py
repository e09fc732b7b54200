"""Inference: every convolution with its batch norm, shortcut and activation is one call, and nothing is kept from it.

Kernels form scale and shift from the parameters and running statistics as they are stored at that moment. Whoever
serves a model that does not change has its batch norms folded once by `fusedres.freeze`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fusedres.activation import Activation
from fusedres.operands import ConvInput, Layer, Norm, statistics_dtype
from fusedres.ops.bn_act import bn_act
from fusedres.ops.bn_finalize import bn_from_running
from fusedres.ops.conv_bn_act import Contraction, conv_bn_act
from fusedres.patterns.door import with_rounded_weights
from fusedres.runtime.call import Call
from fusedres.runtime.replay import replayed


def evaluated(layers: Sequence[Layer], call: Call) -> tuple[Layer, ...]:
    """Layers in evaluation: each weight in the dtype of the contractions, and nobody counts batches."""
    return tuple(
        layer._replace(
            weight=layer.weight if layer.rounded is None else layer.rounded, norm=uncounted(layer.norm), rounded=None
        )
        for layer in with_rounded_weights(layers, call.dtype)
    )


def uncounted(norm: Norm) -> Norm:
    """A batch norm in evaluation."""
    return norm._replace(counted=None)


def run(call: Call, function: Callable[..., Tensor], *operands: Any) -> Tensor:
    """``function(*operands)``, done again by notes where it launches kernels."""
    return replayed(function, *operands) if call.kernels else function(*operands)


def contraction(u: ConvInput, layer: Layer) -> Contraction:
    """A layer as the operand of an op that consumes ``u``; without a batch norm its bias alone is added."""
    norm = layer.norm
    if norm.running_mean is None or norm.running_var is None:
        shift = None if norm.bias is None else norm.bias.to(statistics_dtype(layer.weight.dtype))
        return Contraction(u, layer.weight, layer.geometry, shift=shift)
    return Contraction(u, layer.weight, layer.geometry, running=norm)


def through(u: ConvInput, layers: Sequence[Layer]) -> ConvInput:
    """act(bn(conv(...))) by every layer."""
    for layer in layers:
        u = ConvInput(conv_bn_act(contraction(u, layer), act=layer.act)[0])
    return u


def normalised(x: Tensor, norm: Norm, act: Activation, call: Call) -> ConvInput:
    """act(bn(x)) from running statistics, formed on load where kernels do that.

    Its numbers are formed by a launch of their own: a convolution's loop would form them at every tap.
    """
    numbers = bn_from_running(norm, statistics_dtype(x.dtype))
    if call.kernels and x.dtype == call.dtype:
        return ConvInput(x, numbers.scale, numbers.shift, act)
    return ConvInput(bn_act(x, numbers.scale, numbers.shift, act=act)[0].to(call.dtype))
