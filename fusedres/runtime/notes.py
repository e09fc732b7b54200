"""What a pass did, noted as steps with numbered places for tensors, and written out as a Python function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Place(int):
    """Stands where a tensor stood, in nested containers: its number."""


def like(container: Any, parts: list[Any]) -> Any:
    """A list, tuple or named tuple of other parts."""
    return type(container)(*parts) if hasattr(container, "_fields") else type(container)(parts)


# Stands for the stream that is current where a pass is gone through: Triton would ask for it at each launch.
STREAM: Any = object()


def _current_stream() -> int:
    return torch.cuda.current_stream().cuda_stream


class Step(NamedTuple):
    """``call(*args, **kwargs)`` with `Place` for tensors, also inside of containers.

    ``output`` is the number of the tensor it makes, of each of several, or None; ``dead`` are those of no more use.
    """

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: int | tuple[int | None, ...] | None
    dead: tuple[int, ...] = ()

    @property
    def inputs(self) -> list[Place]:
        """The tensors that it takes."""
        return places_in((self.args, self.kwargs))

    @property
    def outputs(self) -> list[int]:
        """The tensors that it makes."""
        made = self.output if isinstance(self.output, tuple) else (self.output,)
        return [number for number in made if number is not None]


@dataclass(frozen=True)
class Notes:
    """The steps of a pass, and what it gives with `Place` for tensors, of which the first are its operands."""

    operands: int
    steps: Sequence[Step]
    result: Any
    device: torch.device

    @functools.cached_property
    def play(self) -> Callable[[list[Tensor]], Any]:
        """Goes through the steps on operands of the kind that was noted: a function of nothing but their calls.

        It empties the list of them, and lets go of each tensor when nothing uses it any more.
        """
        written = _Expressions()
        lines = [f"{_variables(range(self.operands))} = operands", "operands.clear()"]
        if any(value is STREAM for step in self.steps for value in step.kwargs.values()):
            lines.append(f"stream = {written.constant(_current_stream)}()")
        for step in self.steps:
            arguments = [*map(written.expression, step.args)]
            arguments += [f"{name}={written.expression(value)}" for name, value in step.kwargs.items()]
            call = f"{written.constant(step.call)}({', '.join(arguments)})"
            target = "" if step.output is None else f"{_variables(step.output)} = "
            lines.append(target + call)
            lines.extend(f"del {variable}" for variable in map(_variables, step.dead))
            if "_" in target:
                lines.append("del _")
        lines.append(f"return {written.expression(self.result)}")
        source = "def play(operands):\n" + "".join(f"    {line}\n" for line in lines)
        exec(compile(source, "<notes of a pass>", "exec"), written.names)
        play: Callable[[list[Tensor]], Any] = written.names["play"]
        if self.device.type != "cuda":
            return play

        def on_device(operands: list[Tensor]) -> Any:
            # Triton launches on the current device.
            if torch.cuda.current_device() == self.device.index:
                return play(operands)
            with torch.cuda.device(self.device):
                return play(operands)

        return on_device


def _variables(numbers: int | Iterable[int | None] | None) -> str:
    """The variable of a tensor, or those of several; None stands for what is not new."""
    if numbers is None:
        return "_"
    return f"t{int(numbers)}" if isinstance(numbers, int) else f"({''.join(f'{_variables(one)},' for one in numbers)})"


class _Expressions:
    """Python expressions for the values of notes; what has none of its own gets a name."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self._by_identity: dict[int, str] = {}

    def constant(self, value: Any) -> str:
        """A name for a value."""
        name = self._by_identity.setdefault(id(value), f"c{len(self.names)}")
        self.names[name] = value
        return name

    def expression(self, part: Any) -> str:
        """What makes a value, of the variables of tensors where there are some in it."""
        if isinstance(part, Place):
            return _variables(part)
        if part is STREAM:
            return "stream"
        if part is None or part.__class__ in (bool, int):
            return repr(part)
        if not (isinstance(part, (tuple, list, dict)) and places_in(part)):
            return self.constant(part)
        if isinstance(part, dict):
            return "{" + ", ".join(f"{name!r}: {self.expression(inner)}" for name, inner in part.items()) + "}"
        inside = "".join(f"{self.expression(inner)}, " for inner in part)
        if part.__class__ is list:
            return f"[{inside}]"
        return f"({inside})" if part.__class__ is tuple else f"{self.constant(part.__class__)}({inside})"


def leaves(part: Any) -> Iterator[Any]:
    """What nested containers hold."""
    if isinstance(part, (tuple, list, dict)):
        for inner in part.values() if isinstance(part, dict) else part:
            yield from leaves(inner)
    else:
        yield part


def places_in(part: Any) -> list[Place]:
    """Every `Place` in nested containers, each once."""
    return list(dict.fromkeys(leaf for leaf in leaves(part) if isinstance(leaf, Place)))
