"""A pass over tensors, noted once for operands of a kind and done again without the Python that decided it.

Which launches and library calls a fused pass makes, on what and in which order, depends on shapes, dtypes and constants
alone: no pass looks at values. Deciding it (checks, tiles, arguments by name) takes a CPU longer than a GPU takes for a
small layer. So the second pass over operands of a kind is noted, as a list of calls with numbered places for tensors,
and every later one goes through that list.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import backends, launch
from .offline import ALIGNMENT
from .plan import tiles

T = TypeVar("T")

# Networks have tens of kinds; a program that changes its shapes or numbers without end must not keep them all.
MOST_NOTES = 2048


class Holding:
    """A constant that holds tensors, which it is not compared by."""

    @property
    def compared(self) -> tuple[Any, ...]:
        """What it is compared by; no tensor is among it, for it is kept for long."""
        raise NotImplementedError

    @property
    def held(self) -> tuple[Tensor | None, ...]:
        """Its tensors."""
        raise NotImplementedError


def replayed(function: Callable[..., T], *operands: Any) -> T:
    """``function(*operands)``, by going through the notes of an earlier call where there are some.

    Args:
        function: decides by shapes, strides, dtypes, devices and constants alone, calls nothing but ops and PyTorch,
            and gives nested tuples of tensors and constants. It may write into its operands.
        operands: nested tuples of tensors and of constants that can be hashed, `Holding` where they hold tensors.

    Returns:
        What the function gives.
    """
    if not _possible():
        return function(*operands)
    kind = _kind(operands)
    if kind is None:
        return function(*operands)
    parts, tensors = kind
    key = (function, backends.current(), torch.backends.cudnn.allow_tf32, parts)
    notes = _notes.get(key, MISSING)
    if isinstance(notes, Notes):
        return cast(T, notes.play(tensors))
    if notes is None:
        return function(*operands)
    if key not in _seen:
        _remember(_seen, key, None)
        return function(*operands)
    result, notes = _noted(function, operands, tensors)
    _seen.pop(key, None)
    _remember(_notes, key, notes)
    return result


MISSING: Any = object()
# Kinds seen once, apart from those that came again, of which there are few.
_seen: dict[tuple[Any, ...], None] = {}
# None: of what can not be noted.
_notes: dict[tuple[Any, ...], Notes | None] = {}


def _remember(store: dict[tuple[Any, ...], T], key: tuple[Any, ...], value: T) -> None:
    store[key] = value
    if len(store) > MOST_NOTES:
        store.pop(next(iter(store)), None)


_lasting: dict[int, Tensor] = {}


def lasting(tensor: Tensor) -> Tensor:
    """``tensor``, which no pass writes to, kept for good: passes may use it though it is no operand of theirs."""
    _lasting[id(tensor)] = tensor
    return tensor


@contextmanager
def off() -> Iterator[None]:
    """Go through every pass as it is written inside the ``with`` block."""
    global _off
    _off += 1
    try:
        yield
    finally:
        _off -= 1


_off = 0


def _possible() -> bool:
    """Whether nobody follows what this call does, or has a say in how."""
    return not (
        _off
        or launch.recording()
        or tiles.chosen_by_hand()
        or torch._C._len_torch_dispatch_stack()
        or torch.compiler.is_compiling()
    )


def _kind(operands: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Tensor]] | None:
    """Everything that a call depends on besides values, and its tensors, each once; None: not all of them are plain."""
    parts: list[Any] = []
    tensors: list[Tensor] = []
    plain = _take(operands, parts, tensors, {})
    return (tuple(parts), tensors) if plain and tensors and not tensors[0].is_meta else None


# Not a function inside the other: one that calls itself there is part of a cycle, which would keep tensors alive.
def _take(operands: tuple[Any, ...], parts: list[Any], tensors: list[Tensor], places: dict[int, int]) -> bool:
    plain = True
    for part in operands:
        of = part.__class__
        if of is nn.Parameter or of is Tensor:
            place = places.setdefault(id(part), len(tensors))
            if place == len(tensors):
                tensors.append(part)
                parts.extend((part.shape, part.stride(), part.dtype, part.device, part.data_ptr() % ALIGNMENT))
            else:
                parts.append(Place(place))
        elif isinstance(part, tuple):
            parts.extend((of, len(part)))
            plain &= _take(part, parts, tensors, places)
        elif isinstance(part, Holding):
            parts.extend((of, part.compared))
            plain &= _take(part.held, parts, tensors, places)
        else:
            plain &= not isinstance(part, Tensor)
            parts.extend((of, part))  # 1, 1.0 and True are equal
    return plain


class Place(int):
    """Stands where a tensor stood, in nested containers: its number."""


def filled(part: Any, tensors: Any) -> Any:
    """The same with tensors, by their numbers, for `Place`."""
    if isinstance(part, Place):
        return tensors[part]
    if isinstance(part, (tuple, list)):
        return like(part, [filled(inner, tensors) for inner in part])
    if isinstance(part, dict):
        return {name: filled(inner, tensors) for name, inner in part.items()}
    return part


def like(container: Any, parts: list[Any]) -> Any:
    """A list, tuple or named tuple of other parts."""
    return type(container)(*parts) if hasattr(container, "_fields") else type(container)(parts)


class _Step(NamedTuple):
    """``call(*values)`` with tensors put at ``inputs`` (place among the values, number of the tensor).

    ``output`` is the number of the tensor it makes, of each of several, or None; ``dead`` are those of no more use.
    """

    call: Callable[..., Any]
    values: list[Any]
    inputs: list[tuple[int, int]]
    output: int | tuple[int | None, ...] | None
    dead: tuple[int, ...]


@dataclass(frozen=True)
class Notes:
    """The steps of a pass, and what it gives with `Place` for tensors."""

    steps: list[_Step]
    made: int
    result: Any
    device: torch.device

    def play(self, operands: list[Tensor]) -> Any:
        """Go through the steps on operands of the kind that was noted."""
        tensors: list[Any] = operands + [None] * self.made
        with _on(self.device):
            for call, values, inputs, output, dead in self.steps:
                arguments = values.copy()
                for place, number in inputs:
                    arguments[place] = tensors[number]
                made = call(*arguments)
                if isinstance(output, int):
                    tensors[output] = made
                elif output is not None:
                    for one_of, one in zip(output, made, strict=True):
                        if one_of is not None:
                            tensors[one_of] = one
                for number in dead:
                    tensors[number] = None
        return filled(self.result, tensors)


def _on(device: torch.device) -> Any:
    """Triton launches on the current device."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)


def _noted(function: Callable[..., T], operands: tuple[Any, ...], tensors: list[Tensor]) -> tuple[T, Notes | None]:
    """What the function gives, and its notes; None where it does something that can not be noted."""
    writer = _Writer(tensors)
    with launch.following(writer), writer:
        result = function(*operands)
    return result, writer.notes(result)


class _Writer(TorchDispatchMode):
    """Notes library calls, which come through the dispatcher, and launches, of which `launch` tells."""

    def __init__(self, operands: list[Tensor]) -> None:
        super().__init__()
        self._operands = operands
        self._steps: list[_Step] = []
        # By identity; a tensor that is gone leaves its own to another.
        self._numbers: dict[int, tuple[int, weakref.ref[Tensor]]] = {}
        self._count = 0
        self._complete = True
        self._apart = False
        for tensor in operands:
            self._give_number(tensor)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Note nothing inside the ``with`` block."""
        self._apart = True
        try:
            yield
        finally:
            self._apart = False

    def launched(self, start: Callable[..., Any], arguments: Sequence[Any]) -> None:
        """A kernel was launched, as ``start(*arguments)`` does again."""
        self._add(start, self._with_places(tuple(arguments)), None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # What is asked of dtypes alone comes this way too, and is decided already.
        if not self._apart and (
            isinstance(result, (Tensor, tuple, list))
            or any(isinstance(leaf, Tensor) for leaf in _leaves((args, kwargs)))
        ):
            self._note(func, self._with_places(args), self._with_places(kwargs), result)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        output = self._output(result)
        # Counted from where the operand's memory begins, which its kind does not tell.
        self._complete &= func is not torch.ops.aten.as_strided.default
        if func is torch.ops.aten.empty.memory_format:
            # The most frequent call by far, and by this name half as long.
            self._add(functools.partial(torch.empty, *args, **_given(kwargs)), (), output)
        elif any(_places(part) for part in (kwargs, *args) if not isinstance(part, Place)):
            places = _places((args, kwargs))

            def assembled(*tensors: Tensor) -> Any:
                by_number = dict(zip(places, tensors, strict=True))
                return func(*filled(args, by_number), **filled(kwargs, by_number))

            self._add(assembled, tuple(places), output)
        else:
            self._add(functools.partial(func, **kwargs) if kwargs else func, args, output)

    def _add(self, call: Callable[..., Any], values: Sequence[Any], output: Any) -> None:
        inputs = [(i, int(value)) for i, value in enumerate(values) if isinstance(value, Place)]
        self._steps.append(_Step(call, [None if isinstance(v, Place) else v for v in values], inputs, output, ()))

    def _give_number(self, tensor: Tensor) -> int:
        number, self._count = self._count, self._count + 1
        self._numbers[id(tensor)] = number, weakref.ref(tensor)
        return number

    def _number_of(self, tensor: Tensor) -> int | None:
        number, known = self._numbers.get(id(tensor), (None, lambda: None))
        return number if known() is tensor else None

    def _output(self, result: Any) -> int | tuple[int | None, ...] | None:
        """The numbers of new tensors; what was there before, as calls in place give, has one."""
        if isinstance(result, (tuple, list)):
            return tuple(map(self._single_output, result))
        return self._single_output(result)

    def _single_output(self, result: Any) -> int | None:
        if isinstance(result, Tensor):
            return self._give_number(result) if self._number_of(result) is None else None
        self._complete &= result is None  # a value: what follows may depend on it
        return None

    def _with_places(self, part: Any) -> Any:
        """The same with `Place` for tensors."""
        if isinstance(part, Tensor):
            number = self._number_of(part)
            if number is not None:
                return Place(number)
            self._complete &= id(part) in _lasting
            return part
        if isinstance(part, (tuple, list)):
            return like(part, [self._with_places(inner) for inner in part])
        if isinstance(part, dict):
            return {name: self._with_places(inner) for name, inner in part.items()}
        return part

    def notes(self, result: Any) -> Notes | None:
        """What was noted; ``result`` is what the function gave."""
        result = self._with_places(result)
        if not self._complete:
            return None
        operands = len(self._operands)
        last = dict.fromkeys(range(self._count), -1)
        for at, step in enumerate(self._steps):
            made = step.output if isinstance(step.output, tuple) else (step.output,)
            last.update((number, at) for number in made if number is not None)
            last.update((number, at) for _, number in step.inputs)
        dead: dict[int, list[int]] = {}
        for number in set(range(operands, self._count)).difference(_places(result)):
            dead.setdefault(last[number], []).append(number)
        steps = [step._replace(dead=tuple(dead.get(at, ()))) for at, step in enumerate(self._steps)]
        return Notes(steps, self._count - operands, result, self._operands[0].device)


def _leaves(part: Any) -> Iterator[Any]:
    """What nested containers hold."""
    if isinstance(part, (tuple, list, dict)):
        for inner in part.values() if isinstance(part, dict) else part:
            yield from _leaves(inner)
    else:
        yield part


def _places(part: Any) -> list[Place]:
    """Every `Place` in nested containers, each once."""
    return list(dict.fromkeys(leaf for leaf in _leaves(part) if isinstance(leaf, Place)))


def _given(named: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in named.items() if value is not None}
