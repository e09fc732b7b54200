"""A pass over tensors, noted once for operands of a kind and done again without the Python that decided it.

Which launches and library calls a fused pass makes, on what and in which order, depends on shapes, dtypes and constants
alone: no pass looks at values. Deciding it (checks, tiles, arguments by name) takes a CPU longer than a GPU takes for a
small layer. So the second pass over operands of a kind is noted, as a list of calls with numbered places for tensors;
that list is written out as a Python function, which every later pass calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fusedres.compiler.binary import ALIGNMENT
from fusedres.context import context, here
from fusedres.operands import Geometry, PoolGeometry
from fusedres.runtime import backends, launch, switches
from fusedres.runtime.collectives import exchange
from fusedres.runtime.fallback import prepare_for_failure
from fusedres.runtime.holding import Holding
from fusedres.runtime.notes import Notes, leaves
from fusedres.runtime.torch_private import dispatch_keys, dispatch_modes, thread_dispatch
from fusedres.runtime.tracer import take_notes

T = TypeVar("T")

# Networks have tens of kinds; a program that changes its shapes or numbers without end must not keep them all.
MOST_NOTES = 2048


def replayed(function: Callable[..., T], *operands: Any) -> T:
    """``function(*operands)``, by going through the notes of an earlier call where there are some.

    Args:
        function: decides by shapes, strides, dtypes, devices and constants alone, calls nothing but ops and PyTorch,
            and gives nested tuples of tensors and constants. It may write into its operands.
        operands: nested tuples of tensors and of constants that can be hashed, `Holding` where they hold tensors.

    Returns:
        What the function gives.
    """
    return replayed_at_last(function, list(operands), _nothing)


def replayed_at_last(function: Callable[..., T], operands: list[Any], let_go: Callable[[], object]) -> T:
    """`replayed` by somebody who needs the operands no more: notes free each as soon as no step uses it.

    Args:
        function: as there.
        operands: as there; emptied before notes are played.
        let_go: is called then, too, and drops what else holds them.
    """
    if not _possible():
        return _gone_through(function, operands)
    kind = _kind(operands)
    if kind is None:
        return _gone_through(function, operands)
    parts, tensors = kind
    key = (function, backends.current(), launch.tf32_allowed(), thread_dispatch(), here().decisions, parts)
    notes = _notes.get(key, MISSING)
    if isinstance(notes, Notes):
        # Of threads that come here together one checks.
        if key in _unchecked and not _is_captured(tensors[0]) and _unchecked.pop(key, MISSING) is not MISSING:
            return cast(T, _held_against(function, operands, notes, tensors))
        del kind
        operands.clear()
        let_go()
        return cast(T, notes.play(tensors))
    if notes is None:
        return _gone_through(function, operands)
    if key not in _seen:
        _remember(_seen, key, None)
        return _gone_through(function, operands)
    prepare_for_failure()
    result, notes = take_notes(function, operands, tensors)
    _seen.pop(key, None)
    _remember(_notes, key, notes)
    if switches.STRICT and not _waits(notes):
        _remember(_unchecked, key, None)
    return result


def _nothing() -> None:
    """Nobody holds the operands but the caller, who keeps them."""


def _gone_through(function: Callable[..., T], operands: Sequence[Any]) -> T:
    """The pass as it is written."""
    prepare_for_failure()
    return function(*operands)


MISSING: Any = object()
# Kinds seen once, apart from those that came again, of which there are few.
_seen: dict[tuple[Any, ...], None] = {}
# None: of what can not be noted.
_notes: dict[tuple[Any, ...], Notes | None] = {}
# Notes that have not been replayed yet, where their first replay is to be held against the pass as it is written.
_unchecked: dict[tuple[Any, ...], None] = {}


class ReplayDiffers(RuntimeError):
    """The replay of a pass gave other bits than the pass itself: a fault of fusedres."""


def _held_against(function: Callable[..., Any], operands: Sequence[Any], notes: Notes, tensors: list[Tensor]) -> Any:
    """The replay, which must do to the bit what the pass does as it is written, operands that are written to included.

    Raises:
        ReplayDiffers: it does not.
    """
    memories = {memory.data_ptr(): _bytes_of(memory) for memory in (t.untyped_storage() for t in tensors)}
    before = {address: memory.clone() for address, memory in memories.items()}
    expected = [_bits(leaf) for leaf in leaves(function(*operands)) if isinstance(leaf, Tensor)]
    after = {address: memory.clone() for address, memory in memories.items()}
    for address, memory in memories.items():
        if not torch.equal(memory, before[address]):
            memory.copy_(before[address])
    result = notes.play(tensors)
    given = [_bits(leaf) for leaf in leaves(result) if isinstance(leaf, Tensor)]
    same = len(given) == len(expected) and all(map(torch.equal, given, expected))
    if not same or not all(torch.equal(memory, after[address]) for address, memory in memories.items()):
        what = "its result" if not same else "what it wrote to its operands"
        raise ReplayDiffers(f"{function.__module__}.{function.__name__}: the replay differs in {what}")
    return result


def _waits(notes: Notes | None) -> bool:
    """Whether other processes take part in a pass, which go through it once."""
    return notes is not None and any(step.call is exchange for step in notes.steps)


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
        # Copied by one call: while an iterator stood, another thread could change it.
        store.pop(next(iter(tuple(store))), None)


def off() -> AbstractContextManager[None]:
    """Go through every pass as it is written inside the ``with`` block."""
    return context(replays=False)


def _possible() -> bool:
    """Whether nobody follows what this call does, or has a say in how."""
    now = here()
    return not (
        not now.replays
        or launch.is_recorded()
        or now.tiles_by_hand
        or now.witness is not None
        or dispatch_modes()
        or torch.compiler.is_compiling()
    )


def _kind(operands: Sequence[Any]) -> tuple[tuple[Any, ...], list[Tensor]] | None:
    """Everything that a call depends on besides values, and its tensors, each once; None: not all of them are plain."""
    parts: list[Any] = []
    tensors: list[Tensor] = []
    plain = _take(operands, parts, tensors, {})
    return (tuple(parts), tensors) if plain and tensors and not tensors[0].is_meta else None


# Constants of these classes hold no tensors.
SIMPLE = {type(None), bool, int, float, str, torch.dtype, torch.Size, Geometry, PoolGeometry}


# Not a function inside the other: one that calls itself there is part of a cycle, which would keep tensors alive.
def _take(operands: Sequence[Any], parts: list[Any], tensors: list[Tensor], places: dict[int, int]) -> bool:
    plain = True
    for part in operands:
        of = part.__class__
        if of is nn.Parameter or of is Tensor:
            place = places.setdefault(id(part), len(tensors))
            if place == len(tensors):
                tensors.append(part)
                keys = dispatch_keys(part).raw_repr()
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
            constants, held = part.taken_apart()
            parts.append(constants)
            plain &= _take(held, parts, tensors, places)
        else:
            plain &= not isinstance(part, Tensor)
            parts.append((of, part))
    return plain
