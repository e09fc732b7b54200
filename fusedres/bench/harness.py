"""One comparison: contenders of a case under a setting, each through the gate, then timed in turns."""

from __future__ import annotations

import gc
import math
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import Any

import torch

from fusedres.bench import machine as machines
from fusedres.bench import rows as statuses
from fusedres.bench.cases import Case
from fusedres.bench.contenders import YARDSTICK, Contender, operands_of, own_copies
from fusedres.bench.declared import declared, flops_of
from fusedres.bench.gate import Gate
from fusedres.bench.rows import Row
from fusedres.bench.setting import NotSupported, Setting
from fusedres.bench.steps import Step
from fusedres.measure.accuracy import Observed
from fusedres.measure.timing import Clock, Timing, clock_for, interleave
from fusedres.traffic.saved import saved_bytes

__all__ = ["Comparison", "DeviceLost", "Measurement", "compare"]


class DeviceLost(RuntimeError):
    """The GPU takes no more work from this process; ``rows`` are those that were finished."""

    def __init__(self, message: str, rows: list[Row]) -> None:
        super().__init__(message)
        self.rows = rows


@dataclass(frozen=True)
class Measurement:
    """How to measure: ``rounds``, begun within ``limit`` seconds of work; ``timed``: or only the gate."""

    rounds: int = 11
    limit: float = math.inf
    timed: bool = True


class Comparison:
    """The state of one comparison while its contenders are prepared."""

    def __init__(self, case: Case, setting: Setting, measurement: Measurement) -> None:
        self.case, self.setting, self.measurement = case, setting, measurement
        self.gate = Gate(case, setting)
        self.rows: dict[str, Row] = {}
        self.steps: dict[str, Step] = {}
        self.eager: Observed | None = None
        self.machine = asdict(machines.machine(setting.device))
        # While the GPU's memory is empty.
        self.peaks = machines.peaks(setting.device, setting.dtype) if measurement.timed else None

    def row(self, contender: str, status: str, reason: str | None = None, **figures: Any) -> Row:
        setting = self.setting
        return Row(
            self.case.name, self.case.kind, setting.mode, setting.dtype, setting.batch, setting.px, contender, status,
            reason, **figures, **self.machine, date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )  # fmt: skip

    def fail(self, contender: str, error: BaseException) -> None:
        """Note what a contender raised, and let go of its memory.

        Raises:
            DeviceLost: the GPU is of no more use to this process.
        """
        status = statuses.FAILED
        if isinstance(error, NotSupported):
            status = statuses.NOT_AVAILABLE
        elif out_of_memory(error):
            status = statuses.MEMORY
        self.rows[contender] = self.row(contender, status, description(error))
        self.steps.pop(contender, None)
        traceback.clear_frames(error.__traceback__)  # their variables hold what was allocated
        gc.collect()
        if self.setting.device.is_gpu:
            try:
                torch.cuda.synchronize(self.setting.device.torch)
                torch.cuda.empty_cache()
            except RuntimeError as lost:
                raise DeviceLost(f"{contender}: {description(lost)}", [self.rows[contender]]) from error

    def prepare(self, contender: Contender, operands: tuple[Any, ...]) -> None:
        """First step, memory, gate; the step is kept if all is well."""
        gpu = self.setting.device.torch if self.setting.device.is_gpu else None
        held = 0
        if gpu is not None:
            torch.cuda.synchronize(gpu)
            held = torch.cuda.memory_allocated(gpu)
            torch.cuda.reset_peak_memory_stats(gpu)
        start = time.perf_counter()
        with contender.backend(self.setting):
            step = contender.prepare(self.case, self.setting, own_copies(operands))
            observed = step.observe()
        if gpu is not None:
            torch.cuda.synchronize(gpu)
        first = time.perf_counter() - start
        peak = None if gpu is None else torch.cuda.max_memory_allocated(gpu) - held
        if contender.name == YARDSTICK:
            self.eager = observed
        verdict = self.gate.judge(contender, observed, self.eager)
        figures: dict[str, Any] = {
            "first_step_s": first, "peak_bytes": peak, "error": finite(verdict.error), "bound": finite(verdict.bound),
        }  # fmt: skip
        if verdict.reason is not None:
            # A wrong contender has no times, not even that of its first step.
            figures |= {"first_step_s": None, "peak_bytes": None}
            self.rows[contender.name] = self.row(contender.name, statuses.REFUSED, verdict.reason, **figures)
            return
        figures["saved_bytes_per_image"] = self.saved(contender, step)
        self.rows[contender.name] = self.row(contender.name, statuses.OK, contender.remark(self.setting), **figures)
        if self.measurement.timed:
            self.steps[contender.name] = step

    def saved(self, contender: Contender, step: Step) -> float | None:
        """What autograd keeps, where its hooks see it: not inside compiled or captured code."""
        if step.forward is None or contender.fixed_shapes or step.model is None or contender.name.endswith("-graph"):
            return None
        forward = step.forward
        with contender.backend(self.setting):
            return saved_bytes(step.model, lambda model: forward(model)).total / self.setting.batch

    def time(self, contenders: Sequence[Contender], clock: Clock) -> None:
        """Turns, then everything that follows from the medians."""
        runs = {c.name: self.run(c) for c in contenders if c.name in self.steps}
        if not runs:
            return
        seconds = interleave(
            runs, clock, rounds=self.measurement.rounds, limit=self.measurement.limit, on_failure=self.fail
        )
        speeds = asdict(machines.clocks(self.setting.device))
        timings = {name: Timing.of(values) for name, values in seconds.items() if values}
        base = timings.get(YARDSTICK)
        for name, timing in timings.items():
            contender = next(one for one in contenders if one.name == name)
            figures: dict[str, Any] = {
                "median_s": timing.median, "low_s": timing.low, "high_s": timing.high, "rounds": timing.rounds,
                "images_per_s": None if self.case.kind == "op" else self.setting.batch / timing.median,
                "speedup": base.median / timing.median if base is not None else None,
                "launches": self.launches(runs[name]), **speeds,
            }  # fmt: skip
            try:
                figures |= self.counted(contender, contenders, timing.median)
            except Exception as error:  # a time that was measured is worth more than what was not counted
                figures["reason"] = f"not counted: {description(error)}"
            self.rows[name] = replace(self.rows[name], **figures)

    def counted(self, contender: Contender, contenders: Sequence[Contender], median: float) -> dict[str, Any]:
        """Declared figures, and the rates that follow from them.

        All contenders of an op are held to the bytes that the fused one declares: the same work.
        """
        if self.case.kind == "op":
            fused = next((one for one in contenders if one.schedule is not None), None)
            figures = {} if fused is None else self.declared_of(fused)
            figures["flops"] = figures.get("declared_flops")
        else:
            figures = {**self.declared_of(contender), "flops": flops_of(self.case, self.setting)}
        return figures | self.achieved(median, figures)

    def declared_of(self, contender: Contender) -> dict[str, Any]:
        if self.case.kind != "op" and self.setting.device.name == "cpu":
            return {}  # no kernels run there
        counted = declared(self.case, self.setting, contender)
        if counted is None:
            return {}
        return {
            "declared_launches": counted.launches, "declared_bytes": counted.nbytes, "declared_flops": counted.flops,
            "library_calls": counted.library_calls, "declared_whole": counted.whole,
        }  # fmt: skip

    def achieved(self, median: float, figures: dict[str, Any]) -> dict[str, Any]:
        """Rates, and the share of what the machine was measured to be able to do."""
        nbytes, flops = figures.get("declared_bytes"), figures["flops"]
        if not figures.get("declared_whole"):
            nbytes = None
        peaks = self.peaks
        result: dict[str, Any] = {
            "gb_per_s": None if nbytes is None else nbytes / median / 1e9,
            "tflop_per_s": None if flops is None else flops / median / 1e12,
        }
        if peaks is not None:
            result["peak_gb_per_s"] = peaks.bandwidth / 1e9
            result["peak_tflop_per_s"] = peaks.flops / 1e12
            if nbytes is not None and flops is not None:
                result["roofline_s"] = peaks.seconds(nbytes, flops)
                result["of_roofline"] = result["roofline_s"] / median
        return result

    def run(self, contender: Contender) -> Callable[[], object]:
        """The step inside its backend, which costs nothing where that is the default one."""
        step = self.steps[contender.name]
        if contender.schedule is None or not self.setting.device.executed_on_cpu:
            return step.run

        def inside() -> object:
            with contender.backend(self.setting):
                return step.run()

        return inside

    def launches(self, run: Callable[[], object]) -> int | None:
        """Kernels that one step starts on the GPU, by the profiler's count."""
        if not self.setting.device.is_gpu:
            return None
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        try:
            with torch.profiler.profile(activities=activities) as profile:
                run()
                torch.cuda.synchronize(self.setting.device.torch)
            events = profile.events() or []
        except RuntimeError:  # a machine where nobody may count
            return None
        return sum(_is_kernel(event) for event in events) or None


def compare(
    case: Case,
    setting: Setting,
    contenders: Sequence[Contender],
    measurement: Measurement,
    *,
    clock: Clock | None = None,
    done: Collection[str] = (),
    tell: Callable[[str, int, int], None] = lambda *_: None,
) -> list[Row]:
    """One row for each contender, in their order; those named ``done`` have theirs and are left out.

    Args:
        case, setting: what is run.
        contenders: who runs it, the yardstick among them.
        measurement: how.
        clock: what measures; the device's own by default.
        done: names to leave out.
        tell: is called with words, how much is done, and of how much, before each contender and before they are timed.

    Raises:
        DeviceLost: a contender broke the GPU's context.
    """
    comparison = Comparison(case, setting, measurement)
    running = [contender for contender in contenders if contender.name not in done]
    if any(contender.fixed_shapes for contender in running):
        # Code compiled for earlier cases would count against the limit of recompilations.
        torch.compiler.reset()
    with setting.device.made_current(), setting.arithmetic():
        operands = None
        # The yardstick first: others are held against what it computes.
        for place, contender in enumerate(sorted(running, key=lambda one: one.name != YARDSTICK)):
            tell(f"{case.name}, {setting.mode}: {contender.name}", place, len(running) + 1)
            why = setting.why_not() or contender.why_not(case, setting)
            if why is not None:
                comparison.rows[contender.name] = comparison.row(contender.name, statuses.NOT_AVAILABLE, why)
                continue
            try:
                if operands is None:
                    operands = operands_of(case, setting, 0)
                comparison.prepare(contender, operands)
            except Exception as error:
                comparison.fail(contender.name, error)
        tell(f"{case.name}, {setting.mode}: times, in turns", len(running), len(running) + 1)
        comparison.eager = None
        clock = clock or clock_for(setting.device.torch, clear_cache=case.kind == "op")
        comparison.time(running, clock)
    return [comparison.rows[contender.name] for contender in running if contender.name in comparison.rows]


def _is_kernel(event: Any) -> bool:
    """Of the profiler's events: not a copy, not what the host did, not a range that somebody named."""
    if event.device_type != torch.autograd.DeviceType.CUDA or getattr(event, "is_user_annotation", False):
        return False
    return not event.name.startswith(("Memcpy", "Memset"))


def out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the machine had no more memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in ("out of memory", "can't allocate memory", "ALLOC_FAILED"))


def description(error: BaseException) -> str:
    """The kind of an error and the first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
