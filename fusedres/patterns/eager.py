"""What plain modules do: one library call for each convolution, batch norm, activation and sum, kept by autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d

from fusedres.activation import IDENTITY, Activation
from fusedres.autograd.shortcut import Projection, Residual, Shortcut
from fusedres.operands import Layer, Norm
from fusedres.patterns.bn_act import run_bn_act


def normalised(y: Tensor, norm: Norm) -> Tensor:
    """bn(y); running statistics and the count of batches move as a module's do. Where it was folded, y itself."""
    numbers = norm.numbers
    if not numbers.batch_stats and norm.running_mean is None:
        return y
    if numbers.is_shared:  # PyTorch's own takes no tensors on a CPU
        return run_bn_act(y, norm, IDENTITY)
    if numbers.batch_stats and norm.counted is not None:
        with torch.no_grad():
            norm.counted.add_(1)
    running = norm.running_mean, norm.running_var
    return batch_norm(y, *running, norm.gamma, norm.beta, numbers.batch_stats, numbers.momentum, numbers.eps)


def convolved(u: Tensor, layer: Layer, dtype: torch.dtype) -> Tensor:
    """conv(u) in ``dtype``, with its bias."""
    bias = layer.norm.bias
    return conv2d(u.to(dtype), layer.weight.to(dtype), None if bias is None else bias.to(dtype), *layer.geometry)


def layered(u: Tensor, layer: Layer, dtype: torch.dtype) -> Tensor:
    """bn(conv(u))."""
    return normalised(convolved(u, layer, dtype), layer.gained.norm)


def through(u: Tensor, layers: tuple[Layer, ...], dtype: torch.dtype) -> Tensor:
    """act(bn(conv(...))) by every layer."""
    for layer in layers:
        u = layer.act.value(layered(u, layer, dtype))
    return u


def joined(z: Tensor, x: Tensor, shortcut: Shortcut) -> Tensor:
    """The sum with what joins, a projection left out."""
    if isinstance(shortcut, Residual):
        return z if shortcut.tensor is None else z + shortcut.tensor
    return z if isinstance(shortcut, Projection) else shortcut.sum_with(z, x)


def chain(x: Tensor, layers: tuple[Layer, ...], shortcut: Shortcut, act: Activation, dtype: torch.dtype) -> Tensor:
    """act(bn(conv(... act(bn(conv(x))) ...)) + shortcut)."""
    z = layered(through(x, layers[:-1], dtype), layers[-1], dtype)
    if isinstance(shortcut, Projection):
        z = z + layered(x, shortcut.layer, dtype)
    return act.value(joined(z, x, shortcut))


def preact(
    x: Tensor, norm: Norm | None, layers: tuple[Layer, ...], shortcut: Shortcut, act: Activation, dtype: torch.dtype
) -> Tensor:
    """conv(act(bn(... conv(act(bn(x)))))) + shortcut."""
    u = x if norm is None else act.value(normalised(x, norm))
    z = convolved(through(u, layers[:-1], dtype), layers[-1], dtype)
    if isinstance(shortcut, Projection):
        z = z + convolved(u, shortcut.layer, dtype)
    return joined(z, x, shortcut)
