"""Honest times: contenders take turns, and what is reported are medians with their quantiles."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["Clock", "CpuClock", "CudaClock", "Timing", "cache_bytes", "clock_for", "interleave"]

# A turn shorter than this would measure the wait for the GPU as much as the work.
TURN_SECONDS = 0.05
MOST_PER_TURN = 50

Step = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one step over the measured rounds: median, 20 % and 80 % quantiles."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Quantiles are interpolated linearly between the measured values.

        Raises:
            ValueError: there are none.
        """
        if not seconds:
            raise ValueError("seconds: expected at least one measured round, got none")
        values = torch.tensor(seconds, dtype=torch.float64, device="cpu")
        points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64, device="cpu")
        low, median, high = values.quantile(points).tolist()
        return cls(median, low, high, len(seconds))


def cache_bytes(device: torch.device) -> int:
    """Of the L2 cache of a device, or as much as a large one has where nobody tells."""
    told = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return getattr(told, "L2_cache_size", 0) or 64 * 2**20


class Clock(Protocol):
    """Something that can say how long a step takes."""

    def seconds(self, step: Step, times: int) -> float:
        """Seconds of one of ``times`` steps, made one after the other."""


class CpuClock:
    """The time between a step's begin and its end. ``now`` is in seconds."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now

    def seconds(self, step: Step, times: int = 1) -> float:
        start = self.now()
        for _ in range(times):
            step()
        return (self.now() - start) / times


class CudaClock:
    """The time between two events of a GPU's stream.

    With ``clear_cache`` a buffer of twice the L2 cache's size is overwritten before each step, outside of the time, so
    that no step finds its operands there; it also keeps the GPU busy while the step is being launched, the longer the
    more often it is done.
    """

    def __init__(self, device: torch.device, *, clear_cache: bool | int = False) -> None:
        self.device, self.clearings = device, max(1, int(clear_cache))
        self.buffer = None
        if clear_cache:
            self.buffer = torch.empty(2 * cache_bytes(device), dtype=torch.int8, device=device)

    def seconds(self, step: Step, times: int = 1) -> float:
        torch.cuda.synchronize(self.device)
        with torch.cuda.device(self.device):
            if self.buffer is None:
                return self._between_events(step, times) / times
            return sum(self._between_events(step, 1) for _ in range(times)) / times

    def _between_events(self, step: Step, times: int) -> float:
        if self.buffer is not None:
            for _ in range(self.clearings):
                self.buffer.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            step()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def clock_for(device: torch.device, *, clear_cache: bool | int = False) -> Clock:
    """Events on a GPU, wall-clock time elsewhere."""
    return CudaClock(device, clear_cache=clear_cache) if device.type == "cuda" else CpuClock()


def interleave(
    steps: Mapping[str, Step],
    clock: Clock,
    *,
    rounds: int,
    warm_up: int = 2,
    turn: float = TURN_SECONDS,
    limit: float = math.inf,
    least: int = 3,
    on_failure: Callable[[str, Exception], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds per step of each of ``steps``, in each of ``rounds`` rounds.

    In every round each takes a turn of as many steps as fill ``turn`` seconds. The order is turned round from one
    round to the next, and the first one changes, so that a slow phase of the machine hits all alike and none always
    follows the same other.

    Args:
        steps: by name.
        clock: what measures.
        rounds: measured ones, at least 1.
        warm_up: rounds before, whose times are thrown away but for choosing how many steps make a turn.
        turn: seconds.
        limit: seconds after which no new round begins, ``least`` rounds once made.
        least: see ``limit``.
        on_failure: told of a step that raises, which then takes no more turns and has no times; without it, raised.

    Raises:
        ValueError: fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    running = dict(steps)
    per_turn = dict.fromkeys(steps, 1)
    spent = 0.0
    for i_round in range(-warm_up, rounds):
        if i_round >= least and spent > limit:
            break
        for name in in_turn(list(running), i_round + warm_up):
            try:
                taken = clock.seconds(running[name], per_turn[name])
            except Exception as error:
                if on_failure is None:
                    raise
                del running[name], seconds[name]
                on_failure(name, error)
                continue
            spent += taken * per_turn[name]
            if i_round >= 0:
                seconds[name].append(taken)
            else:
                per_turn[name] = max(1, min(MOST_PER_TURN, int(turn / max(taken, 1e-9))))
    return seconds


def in_turn(names: list[str], i_round: int) -> list[str]:
    """The order of a round: rotated by one for every two rounds, and back to front every other."""
    if not names:
        return names
    first = i_round // 2 % len(names)
    order = names[first:] + names[:first]
    return order if i_round % 2 == 0 else order[::-1]
