"""Takes notes of a pass while it runs: library calls come through the dispatcher, launches are told by `launch`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fusedres.runtime import launch
from fusedres.runtime.notes import STREAM, Notes, Place, Step, leaves, like, places_in
from fusedres.runtime.torch_private import DispatchMode

T = TypeVar("T")

_lasting: dict[int, Tensor] = {}


def lasting(tensor: Tensor) -> Tensor:
    """``tensor``, which no pass writes to, kept for good: passes may use it though it is no operand of theirs."""
    _lasting[id(tensor)] = tensor
    return tensor


def take_notes(function: Callable[..., T], operands: Sequence[Any], tensors: list[Tensor]) -> tuple[T, Notes | None]:
    """What the function gives, and its notes; None where it does something that can not be noted."""
    tracer = _Tracer(tensors)
    with launch.follow(tracer), tracer:
        result = function(*operands)
    return result, tracer.notes(result)


class _View(NamedTuple):
    """A tensor that lies in the memory of another, ``root``: from ``offset`` on, or (None) where that one begins."""

    root: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int | None


class _Tracer(DispatchMode):
    """Notes library calls, which come through the dispatcher, and launches, of which `launch` tells."""

    def __init__(self, operands: list[Tensor]) -> None:
        super().__init__()
        self._operands = operands
        self._steps: list[Step] = []
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
        self._steps.append(Step(start, self._with_places(tuple(arguments)), kwargs, None))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # What is asked of dtypes alone comes this way too, and is decided already.
        if not self._apart and (
            isinstance(result, (Tensor, tuple, list))
            or any(isinstance(leaf, Tensor) for leaf in leaves((args, kwargs)))
        ):
            self._note(func, self._with_places(args), self._with_places(kwargs), result)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        output = self._output(result)
        self._complete &= torch.Tag.inplace_view not in func.tags
        if func is torch.ops.aten.unbind.int:
            # By this name, and the next, half as long as by the operator.
            self._steps.append(Step(torch.unbind, args, kwargs, output))
        elif func is torch.ops.aten.empty.memory_format:
            of = {"dtype": result.dtype, "device": result.device}
            self._steps.append(Step(torch.empty_strided, (tuple(result.shape), result.stride()), of, output))
        elif not (func.is_view and self._lies_in(func, args[0], result, output)):
            # Counted from where the operand's memory begins, which its kind does not tell.
            self._complete &= func is not torch.ops.aten.as_strided.default
            self._steps.append(Step(func, args, kwargs, output))

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
        given = places_in(result)
        steps: list[Step] = []
        at_hand = set(range(operands))
        last: dict[int, int] = {}

        def use(places: list[Place]) -> None:
            """Make the views among these that are not at hand."""
            for place in places:
                if place in self._views and place not in at_hand:
                    root, *where = self._views[place]
                    last[root] = last[place] = len(steps)
                    steps.append(Step(torch.as_strided, (Place(root), *where), {}, int(place)))
                at_hand.add(int(place))

        for step in self._steps:
            inputs = step.inputs
            use(inputs)
            last.update(dict.fromkeys((*step.outputs, *inputs), len(steps)))
            steps.append(step)
        use(given)
        dead: dict[int, list[int]] = {}
        for number in (last.keys() | set(range(operands))) - set(given):
            dead.setdefault(last.get(number, 0), []).append(int(number))
        steps = [step._replace(dead=tuple(sorted(dead.get(at, ())))) for at, step in enumerate(steps)]
        return Notes(operands, steps, result, self._operands[0].device)
