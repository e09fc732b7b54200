"""Which modules of a model are fused by what their forward computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from torch import nn

from fusedres.nn.fused import Fused, FusedPass
from fusedres.nn.kinds import holds_norms, is_layer
from fusedres.nn.parts import NotFusable
from fusedres.nn.structure import Finder, Structure
from fusedres.nn.structured import taken_apart


def structured_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that have a fused pass of their own, outermost first.

    A module whose layers are a part of the pass of one above it, in training and in evaluation, is none of them.
    """
    finders = Finder(True), Finder(False)
    inside: list[set[int]] = [set(), set()]
    for module in outermost(model):
        if all(id(module) in parts for parts in inside):
            continue
        found = [_structure(module, finder) for finder in finders]
        wanted = False
        for structure, parts in zip(found, inside, strict=True):
            if structure is not None:
                parts.update(id(module.get_submodule(path)) for path in inlined(structure))
                wanted |= id(module) not in parts
        if wanted:
            yield module


def outermost(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that may have a structure, each once, before those below it; none of what a block that is fused by
    its class does itself."""
    seen: set[int] = set()
    taken: set[int] = set()

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        if id(module) in seen:
            return
        seen.add(id(module))
        cls = type(module)
        by_class = issubclass(cls, Fused) and not cls.fused_by_structure
        if issubclass(cls, Fused) and by_class:
            if issubclass(cls, FusedPass):
                return
            with suppress(NotFusable):
                parts = cls.fused_parts(module)
                own = set(map(id, (*parts.convs, *parts.norms)))
                taken.update(id(inner) for inner in module.modules() if own & set(map(id, inner.children())))
        # A pass of a network's own may have some of its layers.
        if not by_class and id(module) not in taken and not is_layer(module) and holds_norms(module):
            yield module
        for child in module.children():
            yield from walk(child)

    yield from walk(model)


def _structure(module: nn.Module, finder: Finder) -> Structure | None:
    try:
        structure, _ = taken_apart(module, None, finder)
    except NotFusable:
        return None
    return structure if structure.found.fused else None


def inlined(structure: Structure) -> Iterator[str]:
    """The paths of the modules whose forwards are a part of a structure."""
    return (path for path, place in structure.reading.paths.items() if path and structure.reading.seen[place].inlined)
