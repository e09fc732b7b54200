"""The door of every fused pattern: tensors are checked, and training or inference runs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fusedres.autograd.handover import statistics
from fusedres.operands import Layer, Norm, NormNumbers, Partials
from fusedres.ops.bn_finalize import check_norm
from fusedres.ops.checks import check_activation, check_conv_shapes
from fusedres.patterns.choose import CHOSEN, EAGER, Pattern, announce, choose
from fusedres.runtime.call import Call
from fusedres.runtime.weights import rounded

Size = tuple[int, ...]


def enter(pattern: Pattern) -> Tensor:
    """A call of a pattern.

    Raises:
        ValueError, TypeError: naming the argument, before any running statistic or counter has changed.
    """
    check_activation("x", pattern.x)
    # Kernels read memory, and know nothing of a sign that is applied later.
    pattern.x = pattern.x.resolve_neg()
    call = Call.on(pattern.x, pattern.tensors)
    pattern.check(call)
    training = call.differentiated or any(norm.numbers.batch_stats for norm in pattern.norms)
    if pattern.schedule in CHOSEN and call.gpu is not None:
        choice = choose(pattern, call, call.gpu, training=training)
        announce(choice)
        if choice.schedule is EAGER:
            return pattern.plain(call)
        pattern.schedule = choice.schedule.name
    if training:
        return pattern.train(call)
    with call.without_autocast():
        return pattern.infer(call)


def with_rounded_weights(layers: Sequence[Layer], dtype: torch.dtype) -> list[Layer]:
    """Layers with their gains in their batch norms and their weights rounded together, where autocast asks for it."""
    copies = rounded([layer.weight for layer in layers], dtype)
    return [
        layer.gained if copy is layer.weight else layer.gained._replace(rounded=copy)
        for layer, copy in zip(layers, copies, strict=True)
    ]


def leave_statistics(z: Tensor, *partials: Tensor | None) -> Tensor:
    """A pattern's output, its statistics left for the batch norm that follows."""
    counts, mean, m2 = partials
    if counts is not None and mean is not None and m2 is not None:
        statistics.leave(z, Partials(counts, mean, m2))
    return z


def partials_of(x: Tensor, norm: Norm | None) -> Partials | None:
    """The statistics of x that its producer left, if its batch norm measures."""
    return statistics.take(x) if norm is not None and norm.numbers.batch_stats else None


def checked_size(name: str, x: Tensor, layer: Layer, size: Size, call: Call) -> Size:
    """The (N, K, P, Q) that a layer makes of an input of ``size``; refuses what eager PyTorch would refuse."""
    weight = layer.weight
    n = size[0]
    p, q = check_conv_shapes(name, size, weight, layer.geometry)
    if weight.device != x.device:
        raise ValueError(f"weight of {name}: expected it on {x.device}, got {weight.device}")
    if weight.dtype != call.dtype and not call.autocast:
        raise TypeError(f"weight of {name}: expected the dtype of x, {call.dtype}, got {weight.dtype}")
    check_norm_numbers(name, layer.norm.numbers, n * p * q)
    return n, weight.shape[0], p, q


def check_norm_of(size: Size, norm: Norm) -> None:
    """Refuse vectors of another length than an (N, C, H, W) has channels, and numbers that batch norm can not use."""
    check_norm(size[1], norm)
    check_norm_numbers("x", norm.numbers, size[0] * size[2] * size[3])


def check_norm_numbers(name: str, norm: NormNumbers, values: int) -> None:
    """Refuse numbers that batch norm can not use, and statistics over a single value per channel."""
    if not _is_finite("momentum", name, norm.momentum):
        raise ValueError(f"momentum of {name}: expected a finite number, got {norm.momentum}")
    if not _is_finite("eps", name, norm.eps) or norm.eps < 0:
        raise ValueError(f"eps of {name}: expected a finite number of at least 0, got {norm.eps}")
    if norm.batch_stats and values < 2:
        raise ValueError(f"{name}: expected more than 1 value per channel when training, got {values}")


def _is_finite(what: str, name: str, value: float) -> bool:
    try:
        return math.isfinite(value)
    except TypeError as error:
        raise TypeError(f"{what} of {name}: expected a number, got {value!r}") from error


def check_joins(name: str, size: Size, expected: Size) -> None:
    """Refuse a branch of another shape than the chain's output."""
    if size != expected:
        raise ValueError(f"{name}: expected shape {expected} to join the chain's output, got {size}")
