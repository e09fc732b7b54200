"""The fused patterns once more, of differentiable PyTorch: gradients that have derivatives, in every dtype.

Each Function's ``composed`` names its inputs and the form of its pattern up to the last activation. Through that
gradients go by the mask that the forward pass kept, so that what only joins a sum before it (a shortcut, a residual) is
never asked for its values: where the slope is constant, the mask tells it; elsewhere it is the activation's input.

Batch statistics are measured again, by a formula that PyTorch differentiates (its own batch norm refuses eps = 0).
Where running statistics normalised, they are taken from the forward pass, for they may have moved since. Nothing here
writes to running statistics or counters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from fusedres.activation import IDENTITY, Activation
from fusedres.operands import Layer, Norm, Normaliser, statistics_dtype
from fusedres.ops.act_mask import is_bits, unpack_relu_mask
from fusedres.ops.rows import per_channel
from fusedres.runtime.torch_private import forward_class


class Composed(NamedTuple):
    """A pattern as a plain function.

    ``inputs`` are in the order of the Function's ``apply``, None for what is no tensor or not needed; ``form`` takes
    all of them and gives the output before the activation ``act`` of ``mask`` (as of `OutputGrad`; None: there is no
    activation).
    """

    inputs: tuple[Tensor | None, ...]
    form: Callable[..., Tensor]
    mask: Tensor | None = None
    act: Activation = IDENTITY


def composed_gradients(ctx: Any, dz: Tensor, *, create_graph: bool) -> tuple[Tensor | None, ...]:
    """The gradients of everything that was given to a Function, through its plain form.

    Args:
        ctx: of a Function that has ``composed(ctx, dz)``, after its forward pass.
        dz: the gradient at its first output, or a batch of them.
        create_graph: whether what is returned can be differentiated, in all inputs and in ``dz``.
    """
    with torch.enable_grad():
        inputs, form, mask, act = forward_class(ctx).composed(ctx, dz)
        # A weight may have made x too: by aliases only what the form itself does with an input counts.
        inputs = [
            None if tensor is None else tensor.view_as(tensor) if needed else tensor.detach()
            for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=True)
        ]
        z = form(*inputs)
        if mask is not None:
            z = _activated(z, mask, act)
        places = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        wanted = [inputs[i] for i in places]
        found = torch.autograd.grad(z, wanted, dz.to(z.dtype), create_graph=create_graph, allow_unused=True)
    grads: list[Tensor | None] = [None] * len(inputs)
    for i, tensor, grad in zip(places, wanted, found, strict=True):
        # A bias before batch statistics changes nothing.
        grads[i] = torch.zeros_like(tensor) if grad is None else grad
    return tuple(grads)


def _activated(v: Tensor, mask: Tensor, act: Activation) -> Tensor:
    """``v``, whose values may lack a part that joins it, with the derivatives that it has behind the activation."""
    if act.is_open is None:
        return act.value(v + (mask.to(v.dtype) - v).detach())
    open_ = unpack_relu_mask(mask, v.shape[1]) if is_bits(mask) else act.is_open(mask.detach())
    return act.through(v, open_)


def joining(like: Tensor, dtype: torch.dtype | None, anchor: Tensor | None = None) -> Tensor | None:
    """Stands for what joins a sum of the size of ``like`` and has a gradient (zeros, one element in memory).

    ``anchor`` are such zeros, if they are attached to a graph.
    """
    if dtype is None or anchor is not None:
        return anchor
    return torch.zeros(1, dtype=dtype, device=like.device).expand(like.shape).requires_grad_()


def normalised(y: Tensor, norm: Norm, numbers: Normaliser | None) -> Tensor:
    """gamma * (y - mean) * invstd + beta in the statistics dtype; ``numbers`` are the forward pass's."""
    y = y.to(statistics_dtype(y.dtype))
    if norm.numbers.batch_stats:
        y = y - per_channel(_mean(y, numbers))
        invstd = torch.rsqrt(_mean(y.square(), numbers) + norm.numbers.eps)
    else:
        assert numbers is not None
        mean, invstd = numbers.mean, numbers.invstd
        if norm.bias is not None:
            # The bias is part of y, while the forward pass took it off the mean.
            bias = norm.bias.to(y.dtype)
            y, mean = y + per_channel(bias), mean + bias.detach()
        y = y - per_channel(mean)
    y = y * per_channel(invstd if norm.gamma is None else invstd * norm.gamma.to(y.dtype))
    return y if norm.beta is None else y + per_channel(norm.beta.to(y.dtype))


def _mean(values: Tensor, numbers: Normaliser | None) -> Tensor:
    """Of each channel; of all processes' pixels, where these share their statistics, differentiable there too."""
    shared = None if numbers is None else numbers.shared
    if shared is None:
        return values.mean((0, 2, 3))
    from torch.distributed.nn.functional import all_reduce  # some builds of PyTorch have none

    own = values.sum((0, 2, 3)) * (not shared.absent)
    total: Tensor = all_reduce(own, group=shared.group)
    return total / shared.pixels


def convolved(u: Tensor, layer: Layer) -> Tensor:
    """conv(u) without its bias, which belongs to the batch norm."""
    return conv2d(u, layer.weight.to(u.dtype), None, *layer.geometry)


def layered(u: Tensor, layer: Layer, numbers: Normaliser | None) -> Tensor:
    """bn(conv(u)) in the statistics dtype."""
    return normalised(convolved(u, layer), layer.norm, numbers)


def through(u: Tensor, layers: Sequence[Layer], numbers: Sequence[Normaliser | None]) -> Tensor:
    """act(bn(conv(...))) by every layer that has numbers."""
    for layer, of_layer in zip(layers, numbers, strict=False):
        u = layer.act.value(layered(u, layer, of_layer)).to(u.dtype)
    return u
