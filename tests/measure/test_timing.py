"""fusedres.measure.timing: fair turns and right quantiles, on a clock that is not the machine's."""

import contextlib

import pytest
import torch

from fusedres.measure.timing import CpuClock, CudaClock, Timing, in_turn, interleave


class FakeTime:
    """Steps take as long as they say, and note their turn."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def step(self, name: str, *seconds: float):
        left = list(seconds)

        def run() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run

    @property
    def clock(self) -> CpuClock:
        return CpuClock(lambda: self.now)


def test_contenders_take_turns_and_the_order_changes():
    time = FakeTime()
    steps = {name: time.step(name, 1.0) for name in "abc"}
    seconds = interleave(steps, time.clock, rounds=4, warm_up=2)
    assert "".join(time.calls) == "abc cba bca acb cab bac".replace(" ", "")
    assert seconds == {name: [1.0] * 4 for name in "abc"}


def test_every_contender_leads_equally_often():
    first = [in_turn(list("abcd"), i_round)[0] for i_round in range(8)]
    last = [in_turn(list("abcd"), i_round)[-1] for i_round in range(8)]
    assert {name: first.count(name) for name in "abcd"} == dict.fromkeys("abcd", 2)
    assert {name: last.count(name) for name in "abcd"} == dict.fromkeys("abcd", 2)


def test_warm_up_is_thrown_away():
    time = FakeTime()
    seconds = interleave({"slow start": time.step("s", 100.0, 10.0, 1.0, 2.0, 3.0)}, time.clock, rounds=3, warm_up=2)
    assert seconds == {"slow start": [1.0, 2.0, 3.0]}


def test_short_steps_fill_a_turn():
    time = FakeTime()
    steps = {"short": time.step("s", 0.01), "long": time.step("l", 1.0)}
    seconds = interleave(steps, time.clock, rounds=1, warm_up=1, turn=0.1)
    assert seconds["short"] == pytest.approx([0.01])
    assert time.calls.count("s") == 1 + 10
    assert time.calls.count("l") == 2


def test_no_round_begins_after_the_limit_once_there_are_enough():
    time = FakeTime()
    seconds = interleave({"a": time.step("a", 10.0)}, time.clock, rounds=100, warm_up=0, limit=25.0, least=2)
    assert len(seconds["a"]) == 3
    time = FakeTime()
    seconds = interleave({"a": time.step("a", 10.0)}, time.clock, rounds=100, warm_up=0, limit=1.0, least=5)
    assert len(seconds["a"]) == 5


def test_a_step_that_raises_takes_no_more_turns():
    time = FakeTime()
    failures = []

    def broken() -> None:
        raise RuntimeError("no")

    steps = {"broken": broken, "whole": time.step("w", 1.0)}
    seconds = interleave(
        steps, time.clock, rounds=2, on_failure=lambda name, error: failures.append((name, str(error)))
    )
    assert seconds == {"whole": [1.0, 1.0]}
    assert failures == [("broken", "no")]
    with pytest.raises(RuntimeError, match="no"):
        interleave({"broken": broken}, time.clock, rounds=1)


def test_median_and_quantiles():
    timing = Timing.of([5.0, 1.0, 2.0, 4.0, 3.0, 100.0])
    assert (timing.median, timing.low, timing.high, timing.rounds) == (3.5, 2.0, 5.0, 6)


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        interleave({}, CpuClock(), rounds=0)
    with pytest.raises(ValueError, match="at least one measured round"):
        Timing.of([])


def test_a_gpus_clock_clears_the_cache_outside_of_the_time(monkeypatch):
    """On stand-ins for events and buffer: what is called, in which order."""
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("event")

        def synchronize(self) -> None:
            calls.append("wait")

        def elapsed_time(self, _: "Event") -> float:
            return 4.0  # milliseconds

    class Buffer:
        def zero_(self) -> None:
            calls.append("clear")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: calls.append("synchronize"))
    clock = CudaClock(torch.device("cuda"))
    assert clock.seconds(lambda: calls.append("step"), 2) == 2e-3
    assert calls == ["synchronize", "event", "step", "step", "event", "wait"]
    calls.clear()
    clock.buffer = Buffer()
    assert clock.seconds(lambda: calls.append("step"), 2) == 4e-3
    assert calls == ["synchronize", *["clear", "event", "step", "event", "wait"] * 2]
    calls.clear()
    clock.clearings = 3
    assert clock.seconds(lambda: calls.append("step"), 1) == 4e-3
    assert calls == ["synchronize", "clear", "clear", "clear", "event", "step", "event", "wait"]
