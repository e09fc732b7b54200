"""Constants that hold tensors: what they are compared by, and what they hold."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor

HELD = {"held": True}
"""Metadata of a field that is a tensor, a named tuple of them or None."""


class Holding:
    """A frozen dataclass that is not compared by the fields that are `HELD`.

    Others may be such constants themselves, or tuples of them.
    """

    @property
    def compared(self) -> tuple[Any, ...]:
        """What it is compared by; no tensor is among it, for it is kept for long."""
        return self.taken_apart()[0]

    @property
    def held(self) -> tuple[Tensor | None, ...]:
        """Its tensors."""
        return self.taken_apart()[1]

    def taken_apart(self) -> tuple[tuple[Any, ...], tuple[Tensor | None, ...]]:
        """`compared` and `held`, in one walk: every call of a fused pass asks for both."""
        constants: list[Any] = []
        found: list[Tensor | None] = []
        _take_apart(self, constants, found)
        return tuple(constants), tuple(found)


@functools.cache
def _fields(cls: Any) -> tuple[Callable[[Any], tuple[Any, ...]], tuple[str, ...]]:
    """What gets the values that a class is compared by, and the names of what it holds."""
    fields = dataclasses.fields(cls)
    names = [field.name for field in fields if field.compare]
    # Of a single name it would give the value itself.
    values = (
        operator.attrgetter(*names) if len(names) > 1 else lambda one: tuple([getattr(one, name) for name in names])
    )
    return values, tuple([field.name for field in fields if "held" in field.metadata])


def _take_apart(constant: Any, constants: list[Any], found: list[Tensor | None]) -> None:
    of = constant.__class__
    values, holding = _fields(of)
    constants.append(of)
    for value in values(constant):
        if isinstance(value, Holding):
            _take_apart(value, constants, found)
        elif value.__class__ is tuple:
            constants.append(len(value))
            for inner in value:
                if isinstance(inner, Holding):
                    _take_apart(inner, constants, found)
                else:
                    constants.append(inner)
        else:
            constants.append(value)
    for name in holding:
        value = getattr(constant, name)
        found.extend(value if isinstance(value, tuple) else (value,))
