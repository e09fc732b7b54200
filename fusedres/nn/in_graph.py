"""Fused modules under `torch.compile`: the compiler goes through a network's own code, and past that of its fused
passes.

Dynamo reads Python line by line, and there is much of it between the call of a block and its pass: is the block as it
was, are there hooks, what is in evaluation. So a block's call is handed over as one call in Dynamo's graph; it runs as
it is where AOTAutograd calls it with tensors of its own, and what it leaves in the graph is the pass as one op
(`autograd.graph`), or the plain modules.

Whatever a module's code decides by is read under Dynamo's eyes once more, so that a change compiles anew: every
constant of every module below it, and which module it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fusedres.context import context
from fusedres.runtime.graphs import is_followed
from fusedres.runtime.torch_private import unseen_by_modes

Path = tuple[str, ...]


# Plain tuples, which every version of Dynamo takes for constants.
Facts = tuple[Path, tuple[str, ...], tuple[Any, ...]]
"""Constants of a module that a compiled graph holds for: where it is, their names, and what they are."""

Told = tuple[int, tuple[Path, ...], tuple[Facts, ...], tuple[tuple[Path, str], ...]]
"""What Dynamo is told of a module: a number by which it is found again, the paths to the modules that the call is
about, what the graph holds for, and where parameters and buffers are, with their names."""


_numbers: WeakIdKeyDictionary = WeakIdKeyDictionary()
_modules: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
_next = itertools.count()


def told_of(module: nn.Module, paths: tuple[Path, ...]) -> Told | None:
    """What a compiler is told of a module and of those below it at ``paths``; None where a hook below it waits for
    calls, which is in the graph only if the compiler itself finds it."""
    below = [inner for path, inner in _inner(module, paths) if path]
    if any(
        inner._forward_hooks or inner._forward_pre_hooks or inner._backward_hooks or inner._backward_pre_hooks
        for inner in below
    ):
        return None
    torch.compiler.allow_in_graph(_called)
    number = _numbers.get(module)
    if number is None:
        number = _numbers[module] = next(_next)
        _modules[number] = module
    facts = [_facts((), module), *(_facts(path, inner) for path, inner in _inner(module, paths) if path)]
    return number, paths, tuple(facts), tuple([(path, name) for path, _, name in _slots(module, paths)])


def in_graph(module: Any, method: str, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A method of a module as one call in the graph of Dynamo, that goes through this; or ``plain``."""
    id(module)  # to Dynamo: the graph holds for this module alone
    told = module.fused_told()
    if told is None:
        return plain(*args, **kwargs)
    number, paths, facts, slots = told
    for path, names, values in facts:
        inner = _at(module, path)
        for name, value in zip(names, values):  # noqa: B905
            if not _is(getattr(inner, name), value):
                return plain(*args, **kwargs)
    tensors = [getattr(_at(module, path), name) for path, name in slots]
    return _called(number, paths, method, tensors, args, kwargs)


def _is(found: Any, told: Any) -> bool:
    # Part by part, since not every Dynamo compares tuples that it was told.
    if isinstance(told, tuple):
        if not isinstance(found, tuple) or len(found) != len(told):
            return False
        return len(told) == 0 or (_is(found[0], told[0]) and _is(found[1:], told[1:]))
    return bool(found == told)


def _at(module: Any, path: Path) -> Any:
    for name in path:
        module = getattr(module, name)
    return module


def _called(
    number: int, paths: Sequence[Path], method: str, tensors: Sequence[Tensor], args: Sequence[Any],
    kwargs: dict[str, Any],
) -> Any:  # fmt: skip
    """A method of a module, its parameters and buffers replaced; where a compiler follows it leaves nodes."""
    module: Any = _modules[number]
    with unseen_by_modes(), context(graphed=False):
        module.fused_prepare(args, kwargs)
    with _standing_in(_slots(module, paths), tensors), context(graphed=is_followed(tensors, args, kwargs)):
        return getattr(module, method)(*args, **kwargs)


@contextmanager
def _standing_in(slots: Sequence[Slot], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Other tensors in the places of a module's own, inside the ``with`` block."""
    before = [table[name] for _, table, name in slots]
    try:
        for (_, table, name), tensor in zip(slots, tensors, strict=True):
            if table[name] is not tensor:
                table[name] = tensor
        yield
    finally:
        for (_, table, name), tensor in zip(slots, before, strict=True):
            if table[name] is not tensor:
                table[name] = tensor


def _inner(module: nn.Module, paths: Sequence[Path]) -> list[tuple[Path, nn.Module]]:
    """The modules at some paths and all below them, each once, and the paths to them."""
    seen: set[nn.Module] = set()
    return [
        ((*path, *name.split(".")) if name else tuple(path), inner)
        for path in paths
        for name, inner in module.get_submodule(".".join(path)).named_modules(seen)
    ]


Slot = tuple[Path, dict[str, Any], str]
"""The path of whose a tensor is, in which table, under which name."""


def _slots(module: nn.Module, paths: Sequence[Path]) -> list[Slot]:
    """Where parameters and buffers are."""
    return [
        (path, table, name)
        for path, inner in _inner(module, paths)
        for table in (inner._parameters, inner._buffers)
        for name, tensor in table.items()
        if tensor is not None
    ]


def _facts(path: Path, inner: nn.Module) -> Facts:
    """The numbers and names that a module's own dictionary holds."""
    own = inner.__dict__
    names = [name for name, value in own.items() if not name.startswith(("_", "fused_")) and _is_fact(value)]
    names += [name for name in ("fused_schedule", "fused_failure") if name in own]
    return path, tuple(names), tuple([own[name] for name in names])


def _is_fact(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_fact, value))
    return value is None or type(value) in (bool, int, float, str)
