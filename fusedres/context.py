"""What a thread has chosen for the calls that it makes, and what of it reaches other threads.

A choice belongs to the thread that made it and lasts as long as a ``with`` block. Two things go further. A backward
pass resumes what its forward pass ran in: on a GPU autograd calls it on threads of its own, which have chosen nothing.
And accounts of launches are of the whole process, so that they hold what such threads launch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ContextDecorator, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

__all__ = [
    "Context",
    "Entered",
    "Snapshot",
    "accounts",
    "context",
    "entered",
    "here",
    "on_all_threads",
    "resume",
    "snapshot",
]


@dataclass(frozen=True, eq=False)
class Context:
    """What is chosen; classes of higher floors are not known here by name.

    Attributes:
        backend: which face of an op runs (`runtime.backends`).
        gpu: the `plan.gpus.Gpu` that rungs are chosen for, whatever the device of the tensors.
        meta_dtype: what fused passes on meta tensors convolve in, as under autocast.
        dry_target: the name of the target whose launches tensors on the meta device make.
        account: of this thread's launches alone, in place of everybody's.
        follower: is told of every launch (`runtime.launch.Follower`).
        listeners: are told of every choice of a rung.
        row_tile, conv_tile, pointwise_tile: in place of the plan's choice.
        place: of the tile to take in every list of the plan.
        decisions: what was decided for the GPU at hand (`plan.decisions`).
        plan: that a model was fused with (`runtime.plans`).
        online: measures choices while a model trains (`patterns.online`).
        profiled: the name of the pass under way where passes are named, empty outside of one (`runtime.ranges`).
        witness: is told of every site where something is decided.
        gathered: takes down every call of a pattern, which runs by eager PyTorch then.
        replays: whether passes are replayed from notes.
        graphed: whether a compiler follows, in whose graph every fused pass is a node; None: PyTorch is asked.
        absent: whether what is computed on stands for no samples (`runtime.collectives`).
    """

    backend: str = "auto"
    gpu: Any = None
    meta_dtype: torch.dtype | None = None
    dry_target: str | None = None
    account: Any = None
    follower: Any = None
    listeners: tuple[Callable[[Any], None], ...] = ()
    row_tile: Any = None
    conv_tile: Any = None
    pointwise_tile: Any = None
    place: int | None = None
    decisions: Any = None
    plan: Any = None
    online: Any = None
    profiled: str | None = None
    witness: list[Any] | None = None
    gathered: list[Any] | None = None
    replays: bool = True
    graphed: bool | None = None
    absent: bool = False

    @property
    def tiles_by_hand(self) -> bool:
        """Whether some tile is not the plan's choice."""
        chosen = self.row_tile, self.conv_tile, self.pointwise_tile, self.place
        return any(choice is not None for choice in chosen)


NOTHING_CHOSEN = Context()


class _Thread(threading.local):
    context = NOTHING_CHOSEN


_thread = _Thread()


def here() -> Context:
    """What this thread goes by."""
    return _thread.context


class Entered(ContextDecorator):
    """Another context of this thread inside the ``with`` block.

    No generator: an interrupt as its block is entered would leave it to be closed some time later, when it put back
    what had been left since. Nothing is called after the one context and before the other.
    """

    def __init__(self, whole: Context | None = None, **changes: Any) -> None:
        self._whole, self._changes = whole, changes

    def _recreate_cm(self) -> Entered:
        return Entered(self._whole, **self._changes)

    def __enter__(self) -> None:
        self._before = _thread.context
        now = replace(self._before if self._whole is None else self._whole, **self._changes)
        _thread.context = now

    def __exit__(self, *_: object) -> None:
        _thread.context = self._before


def context(**changes: Any) -> Entered:
    """This thread's context with other values of some fields, inside the ``with`` block."""
    return Entered(**changes)


class Snapshot(NamedTuple):
    """What a forward pass ran in, and on which thread."""

    context: Context
    thread: int


def snapshot() -> Snapshot:
    """What this thread goes by, for the backward pass; who follows its launches follows no other thread's."""
    now = _thread.context
    return Snapshot(now if now.follower is None else replace(now, follower=None), threading.get_ident())


def resume(forward: Snapshot) -> AbstractContextManager[None]:
    """The backend of a forward pass and its decisions, inside the ``with`` block; all that it ran in, on a thread that
    chose nothing."""
    now, then = _thread.context, forward.context
    if now is NOTHING_CHOSEN and forward.thread != threading.get_ident():
        return entered(then)
    if now.backend == then.backend and now.decisions is then.decisions:
        return nullcontext()
    return context(backend=then.backend, decisions=then.decisions)


def entered(whole: Context) -> Entered:
    """All that ``whole`` holds, on this thread, inside the ``with`` block."""
    return Entered(whole)


# Replaced, never changed: another thread may be going through it.
_accounts: tuple[Any, ...] = ()
_changing = threading.Lock()


def accounts() -> tuple[Any, ...]:
    """Everybody's accounts of launches, of whichever thread; each is a `runtime.launch.Trace`."""
    return _accounts


@contextmanager
def on_all_threads(account: Any) -> Iterator[None]:
    """One more of `accounts` inside the ``with`` block."""
    global _accounts
    with _changing:
        _accounts = (*_accounts, account)
    try:
        yield
    finally:
        with _changing:
            _accounts = tuple(one for one in _accounts if one is not account)
