"""Choices that are measured while a model trains: its first steps take turns among what each block could run on.

A turn is timed by events of the GPU's stream, which are read when they have happened, in a later turn: nobody waits.
Each step is a training step like any other, on one rung or another of the ladder.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fusedres.cache import say_once
from fusedres.context import here
from fusedres.patterns.choose import MEASURING, Choice, Pattern, candidates_for
from fusedres.plan.decisions import Site
from fusedres.plan.schedule import Schedule
from fusedres.runtime import backends, fallback, switches
from fusedres.runtime.call import Call
from fusedres.runtime.launch import LaunchFailed
from fusedres.runtime.torch_private import in_backward, saves_by_hooks

# Turns of each candidate, of which the first is not counted: kernels are compiled and libraries look around then.
TURNS = 5
# Turns that are begun, and end with no backward pass, before a block is left to what is predicted.
MOST_TURNS = 4 * TURNS


class Event(Protocol):
    """A moment on a GPU's stream."""

    def record(self) -> object: ...

    def query(self) -> bool: ...

    def elapsed_time(self, end: Any, /) -> float: ...


@dataclass
class _Turn:
    """One call that is timed: when its forward pass began and ended, and its backward pass."""

    name: str
    events: tuple[Event, Event, Event, Event]
    recorded: int = 0

    def record(self, place: int) -> None:
        if self.recorded == place:
            self.events[place].record()
            self.recorded += 1

    @property
    def over(self) -> bool:
        return self.recorded == 4 and self.events[3].query()

    @property
    def ms(self) -> float:
        begin, end, back, done = self.events
        return begin.elapsed_time(end) + back.elapsed_time(done)


@dataclass
class _Block:
    """What is known of one kind of call."""

    begun: Counter[str] = field(default_factory=Counter)
    under_way: list[_Turn] = field(default_factory=list)
    ms: dict[str, list[float]] = field(default_factory=dict)
    choice: Choice | None = None
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def candidates(self) -> dict[str, Schedule]:
        """All that have not failed."""
        return {name: rung for name, rung in candidates_for(True).items() if name not in self.left_out}

    def read(self) -> None:
        """The events that have happened."""
        for turn in [turn for turn in self.under_way if turn.over]:
            self.under_way.remove(turn)
            self.ms.setdefault(turn.name, []).append(turn.ms)


class Online:
    """What a model that was fused with ``tune="online"`` has found out, and what it still looks for.

    Args:
        event: makes one.
    """

    def __init__(self, event: Callable[[], Event] | None = None) -> None:
        self._event = event or (lambda: torch.cuda.Event(enable_timing=True))
        self._blocks: dict[Site, _Block] = {}
        self._last: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Online], tuple[()]]:
        # Of a copy nothing is known.
        return Online, ()

    def possible(self, call: Call) -> bool:
        """Whether this call may take a turn, or what was found may be taken for it."""
        if call.device != "cuda" or not call.differentiated or backends.current() != backends.DEFAULT:
            return False
        if torch.are_deterministic_algorithms_enabled() or torch.cuda.is_current_stream_capturing():
            return False
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Ranks would choose apart from each other.
            say_once('tune="online" is off under torch.distributed: what fusedres tune found holds, or is predicted')
            return False
        return not (here().replays is False or torch.compiler.is_compiling())

    def run(
        self, site: Site, pattern: Pattern, owner: Any, predicted: Callable[[], Choice],
        on: Callable[[Choice], Tensor],
    ) -> Tensor:  # fmt: skip
        """Run a call on whatever is its turn, or on what was found to be the fastest.

        Args:
            site: of the call.
            pattern: the call.
            owner: the module whose pass it is.
            predicted: what would be chosen without measuring.
            on: runs the call as chosen.
        """
        with self._lock:
            block = self._blocks.setdefault(site, _Block())
            block.read()
            if block.choice is None:
                block.choice = self._decided(block)
            choice, turn = block.choice, None
            if in_backward():
                # A pass that is made once more, for a backward pass that awaits what the first one saved.
                again = candidates_for(True).get(self._last.get(owner, ""))
                choice = choice if again is None else Choice(again, "as in the forward pass", {}, {})
            elif choice is None and not saves_by_hooks():
                turn = self._begun(block)
                choice = None if turn is None else Choice(candidates_for(True)[turn.name], "a turn", {}, {}, MEASURING)
        if turn is not None and choice is not None:
            z = self._timed(block, turn, choice, pattern, on)
            if z is not None:
                self._last[owner] = turn.name
                return z
            choice = None
        choice = choice or predicted()
        self._last[owner] = choice.schedule.name
        return on(choice)

    def _timed(
        self, block: _Block, turn: _Turn, choice: Choice, pattern: Pattern, on: Callable[[Choice], Tensor]
    ) -> Tensor | None:
        """A call that is timed; None, with all as it was, where its candidate does not start or has no memory."""
        fallback.prepare_for_failure()
        turn.record(0)
        try:
            z = on(choice)
        except (LaunchFailed, torch.OutOfMemoryError) as error:
            if switches.STRICT:
                raise
            block.left_out[turn.name] = str(error)
            contact = fallback.current()
            if contact is not None:
                contact.undo()
            return None
        turn.record(1)
        self._follow(turn, pattern, z)
        return z

    def _begun(self, block: _Block) -> _Turn | None:
        """The next turn, of whoever has had fewest; None where all have had theirs, and are awaited."""
        waiting = [
            name for name in block.candidates if len(block.ms.get(name, ())) < TURNS and block.begun[name] < MOST_TURNS
        ]
        if not waiting:
            return None
        name = min(waiting, key=lambda name: block.begun[name])
        block.begun[name] += 1
        turn = _Turn(name, (self._event(), self._event(), self._event(), self._event()))
        # What never came to its backward pass is forgotten.
        block.under_way = [*block.under_way[-MOST_TURNS * len(block.candidates) :], turn]
        return turn

    def _follow(self, turn: _Turn, pattern: Pattern, z: Tensor) -> None:
        """Let the turn know when the gradient comes, and when it has gone through."""
        ends = [tensor for tensor in (pattern.x, *pattern.tensors) if tensor is not None and tensor.requires_grad]
        if not z.requires_grad or not ends:
            return
        z.register_hook(lambda _: turn.record(2))
        handles: list[Any] = []

        def done(_: Tensor) -> None:
            turn.record(3)
            for handle in handles:  # a parameter outlives the step
                handle.remove()

        handles.append(ends[0].register_hook(done))

    def _decided(self, block: _Block) -> Choice | None:
        """What was fastest, once all have been seen often enough."""
        counted = {name: block.ms.get(name, [])[1:] for name in block.candidates}
        if not counted or any(len(times) < TURNS - 1 for times in counted.values()):
            return None
        ms: Mapping[str, float] = {name: median(times) for name, times in counted.items()}
        best = min(ms, key=lambda name: ms[name])
        told = ", ".join(f"{name} {ms[name]:.3g} ms" for name in sorted(ms, key=lambda name: ms[name]))
        source = "measured while training"
        return Choice(candidates_for(True)[best], f"{source}: {told}", {}, {}, source)
