"""What a forward is called with."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor, nn


class Inputs(NamedTuple):
    """What the parameters of a forward are given: which a tensor, which a list of how many tensors (-1: one alone),
    and what the others are."""

    tensors: tuple[tuple[str, int], ...]
    constants: tuple[tuple[str, Any], ...] = ()

    @property
    def names(self) -> list[str]:
        """A name for each tensor."""
        return [f"{name}_{i}" if count >= 0 else name for name, count in self.tensors for i in range(abs(count))]

    def arguments(self, tensors: Sequence[Any]) -> dict[str, Any]:
        """What the forward is called with, of all tensors in order."""
        given, rest = dict(self.constants), iter(tensors)
        for name, count in self.tensors:
            given[name] = next(rest) if count < 0 else list(islice(rest, count))
        return given


@dataclass(frozen=True)
class Forward:
    """The parameters of a forward, those without a default first.

    ``required`` are as in `Inputs`: a list of tensors, where the forward says that it takes one, has two.
    """

    required: tuple[tuple[str, int], ...]
    defaults: tuple[tuple[str, Any], ...]

    def without_options(self) -> Inputs:
        """A tensor, or a list of them, for each parameter without a default."""
        return Inputs(self.required, self.defaults)

    def bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Inputs, tuple[Tensor, ...]] | None:
        """What a call gives, and its tensors; None where it gives something else than tensors and constants."""
        alone = not kwargs and not self.defaults and len(args) == len(self.required) == 1
        if alone and self.required[0][1] < 0 and isinstance(args[0], Tensor):
            return self.without_options(), args
        names = tuple(name for name, _ in (*self.required, *self.defaults))
        if len(args) > len(names):
            return None
        given = {**dict(self.defaults), **dict(zip(names, args, strict=False)), **kwargs}
        if len(given) != len(names) or given.keys() != set(names):
            return None
        tensors: list[tuple[str, int]] = []
        constants: list[tuple[str, Any]] = []
        found: list[Tensor] = []
        for name in names:
            value = given[name]
            if isinstance(value, Tensor):
                tensors.append((name, -1))
                found.append(value)
            elif isinstance(value, _CONSTANTS):
                constants.append((name, value))
            elif type(value) is list and all(isinstance(each, Tensor) for each in value):
                tensors.append((name, len(value)))
                found += value
            else:
                return None
        return (Inputs(tuple(tensors), tuple(constants)), tuple(found)) if found else None


_CONSTANTS = (bool, int, float, str, type(None))
_LIST = re.compile(r"(List|list|Sequence)\[.*Tensor")


def forward_of(cls: type[nn.Module]) -> Forward | str:
    """The forward of a class, or why it can not be called with symbols."""
    return _forward_of(cls.forward)


def lone_input(module: nn.Module) -> str | None:
    """The only parameter of a module's forward that it has to be given, as a tensor as far as it says."""
    forward = forward_of(type(module))
    if isinstance(forward, str) or forward.defaults or len(forward.required) != 1 or forward.required[0][1] >= 0:
        return None
    return forward.required[0][0]


@functools.lru_cache(maxsize=4096)
def _forward_of(forward: Callable[..., Any]) -> Forward | str:
    try:
        parameters = list(inspect.signature(forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return "its forward has no signature"
    required, defaults = [], []
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            return f"its forward takes *{parameter.name}"
        if parameter.kind is parameter.POSITIONAL_ONLY:
            return f"its forward takes {parameter.name} by position alone"
        if parameter.default is parameter.empty:
            required.append((parameter.name, 2 if _LIST.search(str(parameter.annotation)) else -1))
        elif isinstance(parameter.default, _CONSTANTS):
            defaults.append((parameter.name, parameter.default))
        else:
            return f"the default of {parameter.name} is a {type(parameter.default).__name__}"
    if not required:
        return "its forward takes no tensor"
    return Forward(tuple(required), tuple(defaults))
