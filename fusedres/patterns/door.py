"""The door of every fused pattern: tensors are checked, and training or inference runs."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fusedres.autograd.handover import statistics
from fusedres.context import context, here
from fusedres.operands import Layer, Norm, NormNumbers, Partials
from fusedres.ops.bn_finalize import check_norm
from fusedres.ops.checks import check_activation, check_conv_shapes
from fusedres.patterns.choose import (
    AUTO,
    CHOSEN,
    EAGER,
    MEASURING,
    Choice,
    Gathered,
    Pattern,
    announce,
    choose,
    site_of,
)
from fusedres.patterns.graph import evaluated
from fusedres.plan.decisions import entered
from fusedres.runtime import backends, fallback, plans, ranges
from fusedres.runtime.call import Call
from fusedres.runtime.graphs import is_graphed, signed, size_hint
from fusedres.runtime.torch_private import unseen_by_modes
from fusedres.runtime.weights import rounded
from fusedres.traffic.weigh import on_meta

Size = tuple[int, ...]


def enter(pattern: Pattern) -> Tensor:
    """A call of a pattern.

    Raises:
        ValueError, TypeError: naming the argument, before any running statistic or counter has changed.
    """
    check_activation("x", pattern.x)
    if is_absent(pattern.x, pattern.norms):
        pattern.x = one_sample(pattern.x)
        with context(absent=True):
            return enter(pattern)[:0]
    # Kernels read memory, and know nothing of a sign that is applied later.
    pattern.x = signed(pattern.x)
    call = Call.on(pattern.x, pattern.tensors)
    pattern.check(call)
    training = call.differentiated or any(norm.numbers.batch_stats for norm in pattern.norms)
    if call.gpu is None or backends.current() != backends.DEFAULT:
        return _run(pattern, call, training)
    # What was decided for this GPU holds for all that the call does, backward too.
    with entered(plans.for_call(call.gpu)):
        return _run(pattern, call, training)


def is_absent(x: Tensor, norms: Iterable[Norm]) -> bool:
    """Whether a process has no samples where others wait for its statistics."""
    # In this order: to who follows with sizes unknown, a question about one is an answer to it.
    return any(norm.numbers.is_shared for norm in norms) and not x.shape[0]


def one_sample(x: Tensor) -> Tensor:
    """A sample of zeros in the place of none, as part of the graph of x."""
    return pad(x, (0, 0) * 3 + (0, 1))


def _run(pattern: Pattern, call: Call, training: bool) -> Tensor:
    if is_graphed(pattern.x):
        return _graphed(pattern, call, training)
    gathered = here().gathered
    if gathered is not None and pattern.schedule == AUTO and call.gpu is not None:
        told = site_of(pattern, call, training), on_meta(pattern), training, call, fallback.owner()
        z = pattern.plain(call)
        gathered.append(Gathered(*told, on_meta(z)))
        return z
    gpu = call.gpu
    if pattern.schedule not in CHOSEN or gpu is None:
        return _run_on(pattern, call, training)

    def as_chosen(choice: Choice) -> Tensor:
        announce(choice)
        if asked == AUTO:
            _tell_owner(choice)
        if choice.schedule is EAGER:
            with ranges.named(EAGER.name):
                return pattern.plain(call)
        pattern.schedule = choice.schedule.name
        return _run_on(pattern, call, training)

    def choice() -> Choice:
        pattern.schedule = asked
        return choose(pattern, call, gpu, training=training)

    asked, online = pattern.schedule, here().online
    if asked == AUTO and online is not None and online.possible(call):
        timed: Tensor = online.run(site_of(pattern, call, training), pattern, fallback.owner(), choice, as_chosen)
        return timed
    return as_chosen(choice())


def _run_on(pattern: Pattern, call: Call, training: bool) -> Tensor:
    with ranges.named(pattern.schedule):
        if training:
            return pattern.train(call)
        with call.without_autocast():
            return pattern.infer(call)


def _graphed(pattern: Pattern, call: Call, training: bool) -> Tensor:
    """A call as a node of a compiler's graph; as PyTorch's own where these are predicted to be faster."""
    if pattern.schedule in CHOSEN and call.gpu is not None:
        with unseen_by_modes():
            choice = choose(on_meta(pattern, size_hint), call, call.gpu, training=training)
        announce(choice)
        if pattern.schedule == AUTO:
            _tell_owner(choice)
        if choice.schedule is EAGER:
            return pattern.plain(call)
        if training:
            pattern.schedule = choice.schedule.name
    return pattern.train(call) if training else evaluated(pattern, call)


def _tell_owner(choice: Choice) -> None:
    """Let whose pass it is know what was taken, once for each."""
    owner: Any = fallback.owner()
    name = choice.schedule.name
    if owner is not None and owner.fused_choices.get(name) != choice.source:
        told = owner.fused_choices
        if choice.source != MEASURING:  # turns are over where something else is taken
            told = {one: source for one, source in told.items() if source != MEASURING}
        owner.__dict__["fused_choices"] = {**told, name: choice.source}


def with_rounded_weights(layers: Sequence[Layer], dtype: torch.dtype) -> list[Layer]:
    """Layers with their gains in their batch norms and their weights rounded together, where autocast asks for it."""
    if layers and is_graphed(layers[0].weight):  # the op rounds
        return [layer.gained for layer in layers]
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
    return statistics.take(x) if not is_graphed(x) and norm is not None and norm.numbers.batch_stats else None


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
    # Of several processes one may have a single value.
    if norm.batch_stats and values < 2 and not norm.is_shared:
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
