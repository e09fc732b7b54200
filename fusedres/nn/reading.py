"""What was read of a module's forward: it holds for every module of which the same would have been read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import fx, nn

from fusedres.nn.inputs import Inputs
from fusedres.nn.kinds import plain_type


class Seen(NamedTuple):
    """What was asked of a module: where it is, and what was found there."""

    parent: int
    """Its place among what was seen; -1 of the module itself."""
    name: str
    """In its parent."""
    cls: type[nn.Module] | None
    """None: nothing but that it is there."""
    facts: tuple[tuple[str, Any], ...]
    """Entries of its own dictionary."""
    settings: tuple[tuple[str, str, Any], ...]
    """Of objects in its dictionary: which, an attribute, and what that is."""
    nones: tuple[tuple[str, str, bool], ...]
    """Of its tables: which, of what name, and whether nothing is there."""
    children: tuple[str, ...] | None
    """The names of all its children, if the forward went through them."""
    inlined: bool
    """Whether the forward of the module was read too, so that its call is not seen any more."""


class ClassFact(NamedTuple):
    """An attribute of a class that the forward used."""

    cls: type
    name: str
    value: Any


@dataclass(frozen=True)
class Reading:
    """What a forward computes."""

    inputs: Inputs
    nodes: tuple[fx.Node, ...]
    seen: tuple[Seen, ...]
    paths: dict[str, int] = field(repr=False)
    """Path of a module -> its place among what was seen."""
    of_classes: tuple[ClassFact, ...]
    graph: fx.Graph = field(repr=False)
    asks_for_classes: bool
    """Whether it asks what class something has that is a tensor in a call, and was none when it was read."""

    def is_of_code(self) -> bool:
        """Whether the classes have the code still that was read."""
        return all(getattr(cls, name, None) is value for cls, name, value in self.of_classes)

    def modules_of(self, module: nn.Module) -> list[nn.Module] | None:
        """The modules in the places of what was seen; None where something else would be read."""
        found: list[Any] = []
        for parent, name, cls, facts, settings, nones, children, inlined in self.seen:
            one = module if parent < 0 else found[parent].__dict__["_modules"].get(name)
            if one is None:
                return None
            own = one.__dict__
            if cls is not None and type(one) is not cls and plain_type(one) is not cls:
                return None
            for key, value in facts:
                if own.get(key, MISSING) != value:
                    return None
            for key, attribute, value in settings:
                if getattr(own.get(key), attribute, MISSING) != value:
                    return None
            for table, key, none in nones:
                if (own[table].get(key) is None) != none:
                    return None
            if children is not None and tuple(own["_modules"]) != children:
                return None
            if inlined and parent >= 0 and is_watched(one):
                return None
            found.append(one)
        return found if self.is_of_code() else None


MISSING = object()


def is_watched(module: nn.Module) -> bool:
    """Whether somebody waits for the call of a module, or has put something in the place of its methods."""
    own = module.__dict__
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooks) or "forward" in own or own.get("_compiled_call_impl") is not None
