"""A pass over tensors, noted once for operands of a kind and done again without the Python that decided it.

Which launches and library calls a fused pass makes, on what and in which order, depends on shapes, dtypes and constants
alone: no pass looks at values. Deciding it (checks, tiles, arguments by name) takes a CPU longer than a GPU takes for a
small layer. So the second pass over operands of a kind is noted, as a list of calls with numbered places for tensors;
that list is written out as a Python function, which every later pass calls.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import backends, launch, switches
from .contact import unproven
from .offline import ALIGNMENT
from .ops.contract import Geometry, PoolGeometry
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
        return _gone_through(function, operands)
    kind = _kind(operands)
    if kind is None:
        return _gone_through(function, operands)
    parts, tensors = kind
    key = (function, backends.current(), launch.tf32_allowed(), _dispatch(), parts)
    notes = _notes.get(key, MISSING)
    if isinstance(notes, Notes):
        if key in _unchecked and not _is_captured(tensors[0]):
            del _unchecked[key]
            return cast(T, _held_against(function, operands, notes, tensors))
        return cast(T, notes.play(tensors))
    if notes is None:
        return _gone_through(function, operands)
    if key not in _seen:
        _remember(_seen, key, None)
        return _gone_through(function, operands)
    unproven()
    result, notes = _noted(function, operands, tensors)
    _seen.pop(key, None)
    _remember(_notes, key, notes)
    if switches.STRICT:
        _remember(_unchecked, key, None)
    return result


def _gone_through(function: Callable[..., T], operands: tuple[Any, ...]) -> T:
    """The pass as it is written."""
    unproven()
    return function(*operands)


def _dispatch() -> tuple[int, int]:
    """What is done with every call on this thread: inference mode, autocast, other people's dispatch modes."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    return included.raw_repr(), excluded.raw_repr()


MISSING: Any = object()
# Kinds seen once, apart from those that came again, of which there are few.
_seen: dict[tuple[Any, ...], None] = {}
# None: of what can not be noted.
_notes: dict[tuple[Any, ...], Notes | None] = {}
# Notes that have not been replayed yet, where their first replay is to be held against the pass as it is written.
_unchecked: dict[tuple[Any, ...], None] = {}


class ReplayDiffers(RuntimeError):
    """The replay of a pass gave other bits than the pass itself: a fault of fusedres."""


def _held_against(function: Callable[..., Any], operands: tuple[Any, ...], notes: Notes, tensors: list[Tensor]) -> Any:
    """The replay, which must do to the bit what the pass does as it is written, operands that are written to included.

    Raises:
        ReplayDiffers: it does not.
    """
    memories = {memory.data_ptr(): _bytes_of(memory) for memory in (t.untyped_storage() for t in tensors)}
    before = {address: memory.clone() for address, memory in memories.items()}
    expected = [_bits(leaf) for leaf in _leaves(function(*operands)) if isinstance(leaf, Tensor)]
    after = {address: memory.clone() for address, memory in memories.items()}
    for address, memory in memories.items():
        if not torch.equal(memory, before[address]):
            memory.copy_(before[address])
    result = notes.play(tensors)
    given = [_bits(leaf) for leaf in _leaves(result) if isinstance(leaf, Tensor)]
    same = len(given) == len(expected) and all(map(torch.equal, given, expected))
    if not same or not all(torch.equal(memory, after[address]) for address, memory in memories.items()):
        what = "its result" if not same else "what it wrote to its operands"
        raise ReplayDiffers(f"{function.__module__}.{function.__name__}: the replay differs in {what}")
    return result


def _is_captured(tensor: Tensor) -> bool:
    """Whether launches go into a CUDA graph, where nothing can be compared."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _bytes_of(memory: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=memory.device).set_(memory)


def _bits(tensor: Tensor) -> Tensor:
    """The elements of a tensor, as bytes."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


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


# Constants of these classes hold no tensors.
SIMPLE = {type(None), bool, int, float, str, torch.dtype, torch.Size, Geometry, PoolGeometry}


# Not a function inside the other: one that calls itself there is part of a cycle, which would keep tensors alive.
def _take(operands: tuple[Any, ...], parts: list[Any], tensors: list[Tensor], places: dict[int, int]) -> bool:
    plain = True
    for part in operands:
        of = part.__class__
        if of is nn.Parameter or of is Tensor:
            place = places.setdefault(id(part), len(tensors))
            if place == len(tensors):
                tensors.append(part)
                keys = torch._C._dispatch_keys(part).raw_repr()
                parts.append((part.shape, part.stride(), part.dtype, part.device, part.data_ptr() % ALIGNMENT, keys))
                if torch.version.hip is not None:  # whose compiler addresses less than 2 GiB in 32 bits
                    parts.append(part.untyped_storage().nbytes() < 2**31)
            else:
                parts.append(place)
        elif of in SIMPLE:
            parts.append((of, part))  # 1, 1.0 and True are equal
        elif isinstance(part, tuple):
            parts.append((of, len(part)))
            plain &= _take(part, parts, tensors, places)
        elif isinstance(part, Holding):
            parts.append((of, part.compared))
            plain &= _take(part.held, parts, tensors, places)
        else:
            plain &= not isinstance(part, Tensor)
            parts.append((of, part))
    return plain


class Place(int):
    """Stands where a tensor stood, in nested containers: its number."""


def like(container: Any, parts: list[Any]) -> Any:
    """A list, tuple or named tuple of other parts."""
    return type(container)(*parts) if hasattr(container, "_fields") else type(container)(parts)


# Stands for the stream that is current where a pass is gone through: Triton would ask for it at each launch.
STREAM: Any = object()


def _current_stream() -> int:
    return torch.cuda.current_stream().cuda_stream


class _Step(NamedTuple):
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
        return _places((self.args, self.kwargs))

    @property
    def outputs(self) -> list[int]:
        """The tensors that it makes."""
        made = self.output if isinstance(self.output, tuple) else (self.output,)
        return [number for number in made if number is not None]


@dataclass(frozen=True)
class Notes:
    """The steps of a pass, and what it gives with `Place` for tensors, of which the first are its operands."""

    operands: int
    steps: Sequence[_Step]
    result: Any
    device: torch.device

    @functools.cached_property
    def play(self) -> Callable[[list[Tensor]], Any]:
        """Goes through the steps on operands of the kind that was noted: a function of nothing but their calls."""
        written = _Written()
        lines = [f"{_variables(range(self.operands))} = operands"]
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


class _Written:
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
        if not (isinstance(part, (tuple, list, dict)) and _places(part)):
            return self.constant(part)
        if isinstance(part, dict):
            return "{" + ", ".join(f"{name!r}: {self.expression(inner)}" for name, inner in part.items()) + "}"
        inside = "".join(f"{self.expression(inner)}, " for inner in part)
        if part.__class__ is list:
            return f"[{inside}]"
        return f"({inside})" if part.__class__ is tuple else f"{self.constant(part.__class__)}({inside})"


def _noted(function: Callable[..., T], operands: tuple[Any, ...], tensors: list[Tensor]) -> tuple[T, Notes | None]:
    """What the function gives, and its notes; None where it does something that can not be noted."""
    writer = _Writer(tensors)
    with launch.following(writer), writer:
        result = function(*operands)
    return result, writer.notes(result)


class _View(NamedTuple):
    """A tensor that lies in the memory of another, ``root``: from ``offset`` on, or (None) where that one begins."""

    root: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int | None


class _Writer(TorchDispatchMode):
    """Notes library calls, which come through the dispatcher, and launches, of which `launch` tells."""

    def __init__(self, operands: list[Tensor]) -> None:
        super().__init__()
        self._operands = operands
        self._steps: list[_Step] = []
        self._views: dict[int, _View] = {}
        # By identity; a tensor that is gone leaves its own to another.
        self._numbers: dict[int, tuple[int, weakref.ref[Tensor]]] = {}
        self._count = 0
        self._complete = True
        self._apart = False
        # dtype, memory, and where in that it begins: of operands not known the next time.
        self._begins: dict[int, tuple[torch.dtype, int, int]] = {}
        self._memories = {tensor.untyped_storage().data_ptr() for tensor in operands}
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

    def launched(self, start: Callable[..., Any], arguments: Sequence[Any], *, on_gpu: bool) -> None:
        """A kernel was launched, as ``start(*arguments)`` does again."""
        kwargs = {"stream": STREAM} if on_gpu else {}
        self._steps.append(_Step(start, self._with_places(tuple(arguments)), kwargs, None))

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
        self._complete &= torch.Tag.inplace_view not in func.tags
        if func is torch.ops.aten.unbind.int:
            # By this name, and the next, half as long as by the operator.
            self._steps.append(_Step(torch.unbind, args, kwargs, output))
        elif func is torch.ops.aten.empty.memory_format:
            of = {"dtype": result.dtype, "device": result.device}
            self._steps.append(_Step(torch.empty_strided, (tuple(result.shape), result.stride()), of, output))
        elif not (func.is_view and self._lies_in(func, args[0], result, output)):
            # Counted from where the operand's memory begins, which its kind does not tell.
            self._complete &= func is not torch.ops.aten.as_strided.default
            self._steps.append(_Step(func, args, kwargs, output))

    def _lies_in(self, func: Any, whole: Any, result: Any, output: Any) -> bool:
        """Whether a view is known by where it lies in a tensor that is at hand: it is made when something uses it."""
        if not isinstance(whole, Place):
            return False
        root = self._views[whole].root if whole in self._views else int(whole)
        dtype, memory, begin = self._begins[root]
        views = {}
        tensors, numbers = ((result,), (output,)) if isinstance(result, Tensor) else (result, output)
        for tensor, number in zip(tensors, numbers, strict=True):
            offset: int | None = int(tensor.storage_offset())
            # What has a view's schema may have copied: `contiguous` under inference mode, which shows it undecomposed.
            if tensor.untyped_storage().data_ptr() != memory:
                return False
            if tensor.untyped_storage().data_ptr() in self._memories:
                if offset != begin or func is torch.ops.aten.as_strided.default:
                    return False
                offset = None
            if number is None or tensor.dtype != dtype or tensor.is_neg():
                return False
            views[number] = _View(root, tuple(tensor.shape), tensor.stride(), offset)
        self._views.update(views)
        return True

    def _give_number(self, tensor: Tensor) -> int:
        number, self._count = self._count, self._count + 1
        self._numbers[id(tensor)] = number, weakref.ref(tensor)
        self._begins[number] = tensor.dtype, tensor.untyped_storage().data_ptr(), int(tensor.storage_offset())
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
        given = _places(result)
        steps: list[_Step] = []
        at_hand = set(range(operands))
        last: dict[int, int] = {}

        def use(places: list[Place]) -> None:
            """Make the views among these that are not at hand."""
            for place in places:
                if place in self._views and place not in at_hand:
                    root, *where = self._views[place]
                    last[root] = last[place] = len(steps)
                    steps.append(_Step(torch.as_strided, (Place(root), *where), {}, int(place)))
                at_hand.add(int(place))

        for step in self._steps:
            inputs = step.inputs
            use(inputs)
            last.update(dict.fromkeys((*step.outputs, *inputs), len(steps)))
            steps.append(step)
        use(given)
        dead: dict[int, list[int]] = {}
        for number in last.keys() - set(range(operands)) - set(given):
            dead.setdefault(last[number], []).append(int(number))
        steps = [step._replace(dead=tuple(sorted(dead.get(at, ())))) for at, step in enumerate(steps)]
        return Notes(operands, steps, result, self._operands[0].device)


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
