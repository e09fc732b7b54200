"""What was decided for one GPU by measuring, or on paper: found by text, so that a file can hold it.

Where a tile, a way or a rung is chosen, a *site* is consulted: it knows what it is for and what it could take. A thread
goes by the decisions that it has entered; without any the first option stands, which is the plan's own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch

from fusedres.context import context, here

T = TypeVar("T")

BLOCK, WAY, TILE = "block", "way", "tile"
KINDS = (BLOCK, WAY, TILE)
NONE = "none"
"""How a tile that is not taken is written: another kernel runs."""

_DTYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64", torch.int64: "i64",
    torch.uint8: "u8", torch.int8: "i8", torch.bool: "u1",
}  # fmt: skip


class Site(NamedTuple):
    """Where something is decided.

    Attributes:
        kind: of `KINDS`.
        what: is decided, in words that are equal for equal problems of any size.
        size: images or pixels.
    """

    kind: str
    what: str
    size: int


@dataclass(frozen=True)
class Seen:
    """A site that was consulted, and what it could have taken, the first of which it does by default."""

    site: Site
    options: tuple[Any, ...]


@dataclass(eq=False)  # two that hold the same are still two
class Decisions:
    """What was decided, for sites.

    Attributes:
        entries: by kind, by what, by size: a choice as `written` gives it.
        origin: in words, where they come from; empty: nowhere yet.
        measured: whether they were measured, and not predicted.
        exact: whether those of other sizes say nothing.
    """

    entries: dict[str, dict[str, dict[int, Any]]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    origin: str = ""
    measured: bool = True
    exact: bool = False

    def find(self, site: Site) -> Any:
        """The choice for a site, or for the nearest size that there is one for; None: there is none."""
        sizes = self.entries[site.kind].get(site.what)
        if not sizes:
            return None
        if site.size in sizes:
            return sizes[site.size]
        if self.exact:
            return None
        return sizes[min(sizes, key=lambda size: (abs(math.log(max(size, 1) / max(site.size, 1))), size))]

    def put(self, site: Site, choice: Any) -> None:
        """Decide for a site."""
        self.entries[site.kind].setdefault(site.what, {})[site.size] = choice

    def drop(self, site: Site) -> None:
        """Leave a site to its default."""
        self.entries[site.kind].get(site.what, {}).pop(site.size, None)

    def add(self, other: Decisions) -> None:
        """Take over what another holds; where both have a choice, the other's."""
        for kind, every in other.entries.items():
            for what, sizes in every.items():
                self.entries[kind].setdefault(what, {}).update(sizes)

    def copy(self) -> Decisions:
        """The same, apart."""
        entries = {kind: {what: dict(sizes) for what, sizes in every.items()} for kind, every in self.entries.items()}
        return Decisions(entries, self.origin, self.measured, self.exact)

    def __len__(self) -> int:
        return sum(len(sizes) for every in self.entries.values() for sizes in every.values())

    def __bool__(self) -> bool:
        return True


def entered(decisions: Decisions | None) -> AbstractContextManager[None]:
    """Go by these decisions on this thread inside the ``with`` block, or by none."""
    return nullcontext() if here().decisions is decisions else context(decisions=decisions)


def in_force() -> Decisions | None:
    """What this thread goes by."""
    found: Decisions | None = here().decisions
    return found


@contextmanager
def seen() -> Iterator[list[Seen]]:
    """Every site that is consulted on this thread, and on those that resume its passes, inside the ``with`` block."""
    found: list[Seen] = []
    with context(witness=found):
        yield found


def taken(
    kind: str, what: Callable[[], str], size: int, options: Sequence[T], more: Callable[[], Iterable[T]] | None = None
) -> T:
    """What a site takes: the first of its options, if nothing was decided for it.

    Args:
        kind, what, size: of the `Site`.
        options: what it may take; a choice that is a tile may also be one of their class with other numbers.
        more: what tuning tries besides.
    """
    now = here()
    if now.decisions is None and now.witness is None:
        return options[0]
    site = Site(kind, what(), size)
    if now.witness is not None:
        every = dict.fromkeys([*options, *(more() if more is not None else ())])
        now.witness.append(Seen(site, tuple(every)))
    choice = None if now.decisions is None else now.decisions.find(site)
    return options[0] if choice is None else _read(choice, options)


def written(option: Any) -> Any:
    """An option as a file holds it: a name as it is, a tile by its numbers."""
    if option is None:
        return NONE
    return dataclasses.asdict(option) if _is_tile(option) else option


def _read(choice: Any, options: Sequence[T]) -> T:
    """What was `written`; the default where it names nothing that this site can take, as of another version."""
    if isinstance(choice, Mapping):
        for option in options:
            if not _is_tile(option):
                continue
            tile: Any = option
            known = {one.name: getattr(tile, one.name) for one in dataclasses.fields(tile)}
            if choice.keys() == known.keys() and all(type(choice[name]) is type(known[name]) for name in known):
                made: Any = type(option)(**choice)
                return made
        return options[0]
    wanted = None if choice == NONE else choice
    return next((option for option in options if option == wanted), options[0])


def _is_tile(option: Any) -> bool:
    return dataclasses.is_dataclass(option) and not isinstance(option, type)


def spelt(value: Any) -> str:
    """Text that is equal for equal values: numbers, names, dtypes, classes, named tuples and frozen dataclasses.

    Raises:
        TypeError: of anything else, whose text might hold an address.
    """
    if isinstance(value, torch.dtype):
        return _DTYPES.get(value, str(value))
    if isinstance(value, type):
        return value.__qualname__
    if isinstance(value, bool | int | float | str) or value is None:
        return str(value) if isinstance(value, str) else repr(value)
    if isinstance(value, tuple | list):
        name = type(value).__qualname__ if hasattr(value, "_fields") else ""
        return f"{name}({' '.join(map(spelt, value))})"
    if dataclasses.is_dataclass(value):
        compared = [getattr(value, one.name) for one in dataclasses.fields(value) if one.compare]
        return f"{type(value).__qualname__}({' '.join(map(spelt, compared))})"
    raise TypeError(f"value: expected a constant, got {value!r}")
