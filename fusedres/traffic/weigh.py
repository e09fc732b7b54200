"""Which of several ways to compute the same is predicted to be fastest on the GPU at hand: kernels, library calls.

Asked under the backend ``"auto"`` alone: who asks for kernels gets them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fusedres.context import here
from fusedres.plan.decisions import WAY, Seen, Site, entered, spelt
from fusedres.plan.gpus import Gpu
from fusedres.runtime import backends
from fusedres.runtime.call import gpu_of
from fusedres.runtime.holding import Holding
from fusedres.runtime.launch import tf32_allowed
from fusedres.traffic.predict import predicted

# Networks have hundreds of kinds of operands; a program that changes its shapes without end must not keep them all.
MOST_KEPT = 8192
_fastest: dict[Hashable, str] = {}


def fastest(what: Hashable, ways: Mapping[str, Callable[..., object]], *operands: Any, **named: Any) -> str:
    """The name of the way that takes least time; of equals the first.

    Args:
        what: is computed; with the kinds of operands it tells apart what is decided once.
        ways: functions of the operands, which read shapes alone; one that gives ``NotImplemented`` is no way. The first
            is what is taken where nothing is decided: on other backends, and on tensors that run no kernels.
        operands, named: of the functions, nested tuples and dataclasses of tensors and constants.
    """
    first = next(iter(ways))
    if len(ways) < 2 or backends.current() != backends.DEFAULT:
        return first
    now, tensor = here(), _a_tensor(operands)
    if now.decisions is None and now.witness is None:
        return _predicted(what, ways, operands, named)

    def told() -> str:
        name = what if isinstance(what, str) else getattr(what, "__name__", repr(what))
        return f"{name} {_outlined((operands, tuple(sorted(named.items()))), tensor.shape[0])}"

    # Measured ways go before predicted ones, which stand where nothing was measured.
    site = Site(WAY, told(), tensor.shape[0])
    decided = None if now.decisions is None else now.decisions.find(site)
    way = decided if isinstance(decided, str) and decided in ways else _predicted(what, ways, operands, named)
    if now.witness is not None:
        now.witness.append(Seen(site, tuple(dict.fromkeys([way, *ways]))))
    return way


def _predicted(
    what: Hashable, ways: Mapping[str, Callable[..., object]], operands: tuple[Any, ...], named: dict[str, Any]
) -> str:
    gpu = gpu_of(_a_tensor(operands))
    key = (what, tuple(ways), gpu, tf32_allowed(), described(operands), described(tuple(named.values())))
    found = _fastest.get(key)
    if found is None:
        if len(_fastest) >= MOST_KEPT:
            _fastest.clear()
        paper = {name: on_meta(one) for name, one in named.items()}
        # The same whatever was decided by measuring, which the key knows nothing of.
        with entered(None):
            found = _fastest[key] = _decided(ways, on_meta(operands), paper, gpu)
    return found


def forget() -> None:
    """Let everything be weighed anew."""
    _fastest.clear()


def _decided(
    ways: Mapping[str, Callable[..., object]], operands: tuple[Any, ...], named: dict[str, Any], gpu: Gpu
) -> str:
    best, least = next(iter(ways)), (float("inf"), 0.0)
    for name, way in ways.items():
        results: list[object] = []
        with torch.no_grad():
            time = predicted(lambda way=way, results=results: results.append(way(*operands, **named)), gpu)  # type: ignore[misc]
        # Of a small operation the host's time counts: fewer launches are better there.
        if results[0] is not NotImplemented and (time.seconds, time.band[1]) < least:
            best, least = name, (time.seconds, time.band[1])
    return best


def on_meta(value: Any, size: Callable[[Any], int] = int) -> Any:
    """The same with tensors on the meta device in place of its own, laid out alike and as fit for gradients.

    ``size`` makes a number of each size and stride.
    """
    if isinstance(value, Tensor):
        sizes, strides = map(size, value.shape), map(size, value.stride())
        paper = torch.empty_strided(tuple(sizes), tuple(strides), dtype=value.dtype, device="meta")
        return paper.requires_grad_(value.requires_grad)
    if isinstance(value, tuple):
        parts = [on_meta(part, size) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [on_meta(part, size) for part in value]
    if is_dataclass(value) and not isinstance(value, type):
        own = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
        made = {name: on_meta(part, size) for name, part in own.items()}
        changed = {name: part for name, part in made.items() if part is not own[name]}
        return replace(value, **changed) if changed else value
    return value


def described(value: Any) -> Hashable:
    """Equal for operands of one kind: what a prediction depends on."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, tuple):
        return (type(value), *map(described, value))
    if isinstance(value, Holding):
        return type(value), *map(described, vars(value).values())
    found: Hashable = value
    return found


def _outlined(value: Any, batch: int) -> str:
    """Text that is equal for operands of one kind, whatever the batch: of tensors that are not images, dtypes alone."""
    if isinstance(value, Tensor):
        if value.dim() != 4:
            return f"{spelt(value.dtype)}[{value.dim()}]"
        first = "N" if value.shape[0] == batch else str(value.shape[0])
        rows = value.stride(1) == 1 and value.shape[1] > 1
        return f"{spelt(value.dtype)}[{first} {' '.join(map(str, value.shape[1:]))}]{'' if rows else ' apart'}"
    if isinstance(value, tuple | list):
        name = type(value).__name__ if hasattr(value, "_fields") else ""
        return f"{name}({' '.join(_outlined(part, batch) for part in value)})"
    if is_dataclass(value) and not isinstance(value, type):
        compared = (getattr(value, one.name) for one in fields(value) if one.compare or one.metadata.get("held"))
        return f"{type(value).__name__}({' '.join(_outlined(part, batch) for part in compared)})"
    return spelt(value)


def _a_tensor(operands: Any) -> Tensor:
    """The first tensor of nested tuples."""
    while not isinstance(operands, Tensor):
        operands = next(part for part in operands if isinstance(part, Tensor | tuple))
    return operands
