"""Predicted against measured: every launch and library call of a model's step, alone on the GPU.

    python -m fusedres.bench.launches --model resnet50 --batch 256 --dtype bf16 --csv launches.csv

The step, fused as ``"auto"`` and the plan of this GPU have it, and eager, is gone through on paper, as it is for
predictions. Then each distinct launch is made with operands of its own shapes and types that hold random numbers,
between two events of the stream, its operands in memory and not in the L2 cache; a library's call as a call. What the
events add, where in a step another launch follows, is measured at first and taken off. `fusedres calibrate` fits the
model of time to the file.
"""

from __future__ import annotations

import argparse
import csv
import gc
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fusedres
from fusedres.arguments import check_file, check_packages
from fusedres.bench.declared import gpu_of
from fusedres.bench.harness import description
from fusedres.bench.machine import machine
from fusedres.bench.rows import parsed, types_of
from fusedres.bench.setting import Device, device_named
from fusedres.compiler.known import form_of
from fusedres.explain.explanation import DTYPES
from fusedres.measure.timing import Clock, Timing, clock_for
from fusedres.models.sources import source
from fusedres.plan import calibrate
from fusedres.plan.gpus import Gpu, device_gpu
from fusedres.plan.time import bound_by, library_bound_by, seconds_of
from fusedres.runtime.launch import Launch, again, follow
from fusedres.traffic.aten import Call, Made
from fusedres.traffic.meta_autocast import meta_autocast
from fusedres.traffic.predict import is_known, library_call_of, on_paper, prediction, work_of
from fusedres.traffic.tensors import tensors_in

__all__ = ["TimedLaunch", "Work", "distinct", "measure", "png", "read_launches", "steps_on_paper", "table", "totals"]

FUSED, EAGER = "fused", "eager"
DEVICE_LOST = 3
# Of one launch: how long it is repeated, and how often at least and at most.
TURN_SECONDS, FEWEST, MOST = 0.02, 5, 50
# Of the L2 cache before each: 0.1 ms of an H100, longer than Python takes to make any call of the library's.
CLEARINGS = 4
SHOWN = 25
TIME_OVER = "time was over"
# Launches that are started in less time than clearing the cache takes.
FOLLOWING = 16


@dataclass(frozen=True)
class TimedLaunch:
    """One distinct launch, or call into a library, of a step.

    Attributes:
        step: "fused" or "eager".
        name: of our kernel, or of the library's operator.
        tile: of ours.
        operands: shapes of the largest of them, and dtypes.
        kind: of work, of `traffic.aten.KINDS`.
        count: how often the step makes it.
        predicted_s, measured_s: seconds of one; the median of the measured ones, with 20 % and 80 % quantiles.
        events_s: what was taken off these for the events around a launch.
        bound_by: what it waits for longest, by prediction.
        known: whether it is predicted from its own binary; calls are.
        moved, flops: bytes and floating-point operations.
        reason: why it was not measured.
        work: what it asks of a GPU, as `plan.calibrate.written` has it; empty: nothing is known of its binary.
        key: tells launches apart.
        gpu, multiprocessors: of the entry of `plan.gpus` that was predicted for.
        device, driver, torch, triton, cudnn, commit, date: where and when it was measured.
    """

    step: str
    name: str
    tile: str
    operands: str
    kind: str
    count: int
    predicted_s: float
    measured_s: float | None
    low_s: float | None
    high_s: float | None
    events_s: float | None
    bound_by: str
    known: bool
    moved: int
    flops: int
    reason: str
    work: str
    key: str
    gpu: str
    multiprocessors: int
    device: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    cudnn: str = ""
    commit: str = ""
    date: str = ""

    @property
    def ratio(self) -> float | None:
        """Measured over predicted."""
        return None if self.measured_s is None else self.measured_s / self.predicted_s

    @property
    def missed(self) -> float:
        """Seconds of the step by which the prediction is off; infinite where nothing was measured."""
        return math.inf if self.measured_s is None else self.count * abs(self.measured_s - self.predicted_s)


@dataclass(frozen=True)
class Work:
    """What is measured: a launch, or a call with the kernels that it makes."""

    row: TimedLaunch
    launch: Launch | None
    made: Made | None

    def on(self, device: torch.device) -> Callable[[], object]:
        """A function that does it once more, with operands on a device that exists."""
        there = _Placed(device)
        if self.launch is not None:
            assert self.launch.arguments is not None
            started = _Started()
            with follow(started):
                again(self.launch, there.placed(self.launch.arguments))
            return started.again
        assert self.made is not None
        func, args, kwargs = self.made
        args, kwargs = there.placed(tuple(args)), there.placed(dict(kwargs))
        return lambda: func(*args, **kwargs)


class _Started:
    """A `Follower` that keeps the one launch that it is told of."""

    def __init__(self) -> None:
        self.start: Callable[[], object] | None = None

    @contextmanager
    def apart(self) -> Iterator[None]:
        yield

    def launched(self, start: Callable[..., object], arguments: Sequence[Any], *, on_gpu: bool) -> None:
        self.start = lambda: start(*arguments)

    def again(self) -> object:
        assert self.start is not None
        return self.start()


class _Placed:
    """Tensors on a device for those of the meta device, one for each: of random numbers, whole ones 0."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tensors: dict[int, Tensor] = {}

    def placed(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self.tensors:
                self.tensors[id(value)] = self._made(value)
            return self.tensors[id(value)]
        if isinstance(value, Mapping):
            return {name: self.placed(part) for name, part in value.items()}
        if type(value) in (tuple, list):
            return type(value)(map(self.placed, value))
        return self.device if isinstance(value, torch.device) and value.type == "meta" else value

    def _made(self, like: Tensor) -> Tensor:
        # What is expanded lies in memory once.
        sizes = [size if stride else min(size, 1) for size, stride in zip(like.shape, like.stride(), strict=True)]
        made = torch.empty_strided(sizes, like.stride(), dtype=like.dtype, device=self.device)
        if like.dtype.is_floating_point:
            made.normal_()
        elif like.dtype in (torch.uint8, torch.int32):  # bits of masks
            made.random_(0, 256)
        else:  # what holds indices must stay within what they count
            made.zero_()
        return made.as_strided(like.shape, like.stride())


def distinct(step: str, every: Iterable[Launch | Call], gpu: Gpu, known: Mapping[str, str]) -> list[Work]:
    """The launches and calls of a step, each once with its count, what takes longest by prediction first.

    Args:
        step: its name.
        every: with their arguments, as `traffic.predict.on_paper` keeps them.
        gpu: that they are predicted for.
        known: the machine, by fields of `TimedLaunch`.
    """
    found: dict[str, Work] = {}
    calls: dict[int, list[Call]] = {}
    for one in every:
        if isinstance(one, Launch):
            work = _of_launch(step, one, gpu, known)
        else:
            assert one.made is not None
            calls.setdefault(id(one.made), []).append(one)
            continue
        _count(found, work)
    for kernels in calls.values():
        for work in _of_call(step, kernels, gpu, known):
            _count(found, work)
    return sorted(found.values(), key=lambda one: -one.row.count * one.row.predicted_s)


def _count(found: dict[str, Work], work: Work) -> None:
    before = found.get(work.row.key)
    count = 0 if before is None else before.row.count
    found[work.row.key] = replace(work, row=replace(work.row, count=count + 1))


def _of_launch(step: str, one: Launch, gpu: Gpu, known: Mapping[str, str]) -> Work:
    assert one.arguments is not None
    asked = work_of(one, gpu)
    # Of a kernel of which nothing is known, the bytes and FLOPs alone.
    predicted = prediction([one], gpu).band[1]
    numbers = {name: value for name, value in one.arguments.items() if isinstance(value, int)}
    tensors = [value for value in one.arguments.values() if isinstance(value, Tensor)]
    row = TimedLaunch(
        step, one.name, _tile(one), _outline(tensors), one.kind, 0, predicted, None, None, None, None,
        "unknown" if asked is None else bound_by(asked, gpu), is_known(one, gpu), one.bytes_read + one.bytes_written,
        one.flops, "", "" if asked is None else calibrate.written(asked),
        f"{one.name} {one.grid} {form_of(one.binary)} {numbers} {list(map(_kind, tensors))}", gpu.name,
        gpu.multiprocessors, **known,
    )  # fmt: skip
    return Work(row, one, None)


def _of_call(step: str, kernels: Sequence[Call], gpu: Gpu, known: Mapping[str, str]) -> Iterator[Work]:
    made = kernels[0].made
    assert made is not None
    if made.func is torch.ops.aten.convolution_backward.default:
        # Each gradient is a kernel of its own, and can be asked for alone.
        masks = [[i == place for place in range(3)] for i in range(3) if made.args[10][i]]
        parts = [([one], made._replace(args=(*made.args[:10], mask))) for one, mask in zip(kernels, masks, strict=True)]
    else:
        parts = [(list(kernels), made)]
    for own, call in parts:
        asked = tuple(library_call_of(one, gpu) for one in own)
        longest = max(asked, key=lambda one: seconds_of((one,), gpu))
        tensors = list(_tensors((call.args, call.kwargs)))
        name = call.func.overloadpacket.__name__
        row = TimedLaunch(
            step, own[0].cost.name if len(own) == 1 else name, "", _outline(tensors), longest.kind, 0,
            seconds_of(asked, gpu), None, None, None, None, library_bound_by(longest, gpu), True,
            sum(one.read + one.written for one in asked), sum(one.flops for one in asked), "",
            calibrate.written(asked), f"{call.func} {_words(call.args)} {_words(call.kwargs)}", gpu.name,
            gpu.multiprocessors, **known,
        )  # fmt: skip
        yield Work(row, None, call)


def _tensors(value: Any) -> Iterator[Tensor]:
    return tensors_in(value)


def _words(value: Any) -> str:
    """Text that is equal for equal operands."""
    if isinstance(value, Tensor):
        return _kind(value)
    if isinstance(value, Mapping):
        return f"{{{' '.join(f'{name}={_words(part)}' for name, part in value.items())}}}"
    return f"[{' '.join(map(_words, value))}]" if isinstance(value, (tuple, list)) else str(value)


def _kind(tensor: Tensor) -> str:
    return f"{_dtype(tensor)}{list(tensor.shape)}{list(tensor.stride())}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _outline(tensors: Sequence[Tensor]) -> str:
    """The two largest tensors, for people."""
    largest = sorted(tensors, key=lambda one: -one.numel() * one.element_size())[:2]
    return ", ".join(f"{_dtype(one)} {'x'.join(map(str, one.shape))}" for one in largest)


def _tile(one: Launch) -> str:
    sides = [str(value) for name, value in one.specialisation[1] if name.startswith("BLOCK") and value]
    return f"{'x'.join(sides)}, {one.num_warps} warps, {one.num_stages} stages".removeprefix(", ")


def measure(work: Work, device: torch.device, clock: Clock, events: float = 0.0) -> TimedLaunch:
    """The row with its times, ``events`` seconds taken off; with a reason where it can not be made."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    try:
        step = work.on(device)
        step()
        least = clock.seconds(step, 1)
        times = max(FEWEST, min(MOST, int(TURN_SECONDS / max(least, 1e-9))))
        timing = Timing.of([clock.seconds(step, 1) for _ in range(times)])
    except Exception as error:
        return replace(work.row, reason=description(error), date=date)
    # Nothing is left of what is no longer than they are but its order of magnitude.
    median, low, high = (max(one - events, one / 10) for one in (timing.median, timing.low, timing.high))
    return replace(work.row, measured_s=median, low_s=low, high_s=high, events_s=events, date=date)


def events_seconds(clock: Clock, device: torch.device) -> float:
    """What two events around a launch add to its time beside what a launch takes that follows another."""
    one = torch.zeros(1, device=device)

    def median(launches: int) -> float:
        def step() -> None:
            for _ in range(launches):
                one.zero_()

        step()
        return Timing.of([clock.seconds(step, 1) for _ in range(MOST)]).median

    alone = median(1)
    return max(0.0, alone - (median(1 + FOLLOWING) - alone) / FOLLOWING)


def steps_on_paper(
    model: str, batch: int, dtype: str, gpu: Gpu, *, px: int | None = None, infer: bool = False
) -> dict[str, list[Launch | Call]]:
    """What the fused and the eager step of a model launch, without loss and optimiser.

    Raises:
        ValueError: an unknown model or dtype, or one that has nothing to fuse.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    found = source(model).of_images()
    channels, *size = found.size
    images = torch.empty(batch, channels, *([px, px] if px else size), device="meta")
    images = images.contiguous(memory_format=torch.channels_last)
    steps = {}
    for name in (FUSED, EAGER):
        network = found.on_meta().train(not infer)
        if name == FUSED:
            fusedres.fuse(network)
        run = _step(network, images, DTYPES[dtype], infer)
        on_paper(run, gpu)  # constants that kernels read are there after it, as in every step but the first
        steps[name] = on_paper(run, gpu, keep=True)
    return steps


def _step(network: nn.Module, images: Tensor, dtype: torch.dtype, infer: bool) -> Callable[[], None]:
    def run() -> None:
        network.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(not infer), meta_autocast(dtype if dtype.itemsize == 2 else None):
            outputs = [one for one in tensors_in(network(images)) if one.requires_grad]
        if not infer:
            torch.autograd.backward(outputs, [torch.empty_like(one) for one in outputs])

    return run


COLUMNS = [one.name for one in fields(TimedLaunch)]
_TYPES = types_of(TimedLaunch)
# What measuring fills in.
_MEASURED = ("measured_s", "low_s", "high_s", "events_s", "reason", "date")


def read_launches(path: Path) -> list[TimedLaunch]:
    """The rows of a CSV; a time that is no number is none.

    Raises:
        ValueError: it is no such file.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames is None or set(COLUMNS) - set(reader.fieldnames):
                missing = ", ".join(sorted(set(COLUMNS) - set(reader.fieldnames or ())))
                raise ValueError(f"{path}: expected a table of launches, and it has no column {missing}")
            return [TimedLaunch(**{name: parsed(_TYPES[name], one[name] or "") for name in COLUMNS}) for one in reader]
    except OSError as error:
        raise ValueError(f"{path}: expected a table of launches: {error.strerror}") from error
    except (csv.Error, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a table of launches: {error}") from error


class Writer:
    """A CSV whose rows are on disk as they are finished."""

    def __init__(self, path: Path, rows: Sequence[TimedLaunch]) -> None:
        self.file = path.open("w", newline="", encoding="utf-8")
        self.csv = csv.writer(self.file, lineterminator="\n")
        self.csv.writerow(COLUMNS)
        for row in rows:
            self.add(row)

    def add(self, row: TimedLaunch) -> None:
        values = (getattr(row, name) for name in COLUMNS)
        self.csv.writerow("" if value is None else value for value in values)
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def totals(rows: Sequence[TimedLaunch]) -> list[tuple[str, int, float, float, int]]:
    """By step: launches that were measured, predicted and measured seconds of these, and launches that were not."""
    found = []
    for step in dict.fromkeys(row.step for row in rows):
        own = [row for row in rows if row.step == step]
        timed = [row for row in own if row.measured_s is not None]
        found.append((
            step, sum(row.count for row in timed), sum(row.count * row.predicted_s for row in timed),
            sum(row.count * (row.measured_s or 0.0) for row in timed),
            sum(row.count for row in own) - sum(row.count for row in timed),
        ))  # fmt: skip
    return found


HEAD = ("step", "launch", "tile", "operands", "count", "predicted us", "measured us", "ratio", "bound by")


def cells(rows: Sequence[TimedLaunch]) -> list[tuple[str, ...]]:
    """The table, what the step's prediction misses by most first."""
    ordered = sorted((row for row in rows if row.measured_s is not None), key=lambda row: -row.missed)
    return [
        (row.step, row.name, row.tile, row.operands, str(row.count), f"{1e6 * row.predicted_s:.1f}",
         f"{1e6 * (row.measured_s or 0.0):.1f}", f"{row.ratio or 0.0:.2f}", row.bound_by + ("" if row.known else " ?"))
        for row in ordered
    ]  # fmt: skip


def sums(rows: Sequence[TimedLaunch]) -> list[str]:
    """A sentence for each step."""
    return [
        f"{step}: {count} launches, predicted {1e3 * predicted:.2f} ms, measured one by one {1e3 * measured:.2f} ms"
        f" ({measured / predicted if predicted else 0.0:.2f} times)"
        + (f"; {left} launches were not measured" if left else "")
        for step, count, predicted, measured, left in totals(rows)
    ]


def table(rows: Sequence[TimedLaunch], most: int | None = None) -> list[str]:
    """The table in Markdown, and the sums of the steps before it."""
    shown = cells(rows)
    lines = [*(f"- {one}" for one in sums(rows)), ""]
    lines += [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    lines += [f"| {' | '.join(one)} |" for one in shown[:most]]
    if most is not None and len(shown) > most:
        lines += ["", f"The first {most} of {len(shown)}."]
    lines += ["", "Those with the greatest miss of the step first. ?: predicted from the code of a binary like theirs."]
    over = sum(row.reason == TIME_OVER for row in rows)
    if over:
        lines.append(f"- not measured, since {TIME_OVER}: {over} launches of those that take least; run it again")
    for row in rows:
        if row.reason and row.reason != TIME_OVER:
            lines.append(f"- not measured: {row.step}, {row.count} x {row.name} ({row.operands}): {row.reason}")
    return lines


def png(rows: Sequence[TimedLaunch]) -> bytes:
    """A picture: measured over predicted microseconds, and the line where they are equal."""
    # Imported here: measuring needs no pictures.
    from fusedres.bench import pictures

    return pictures.predicted_against_measured(
        [(1e6 * row.predicted_s, 1e6 * row.measured_s, row.count, row.bound_by) for row in rows if row.measured_s]
    )


def _gpu(device: Device) -> Gpu:
    """Whose launches are gone through and predicted."""
    if not device.is_gpu:
        return gpu_of(device)
    index = device.torch.index
    return device_gpu(torch.cuda.current_device() if index is None else index)


def run(
    steps: Mapping[str, Iterable[Launch | Call]], gpu: Gpu, device: Device, *, rows: Sequence[TimedLaunch] = (),
    add: Callable[[TimedLaunch], None] = lambda row: None, seconds: float = math.inf, clock: Clock | None = None,
) -> list[TimedLaunch]:  # fmt: skip
    """Measure what is not among ``rows``; what two steps have in common once.

    Args:
        steps: by name, what each launches.
        gpu: that is predicted for.
        device: that runs them.
        rows: of an earlier run, to be kept.
        add: told of every row as it is finished.
        seconds: after which no more is measured.
        clock: that measures; the device's own with a cleared cache by default.

    Raises:
        RuntimeError: the GPU takes no more work from this process; the row of the launch that did it has been added.
    """
    here = machine(device)
    known = {name: getattr(here, name) for name in ("device", "driver", "torch", "triton", "cudnn", "commit")}
    clock = clock or clock_for(device.torch, clear_cache=CLEARINGS)
    done = {(row.step, row.key): row for row in rows}
    by_key = {row.key: row for row in rows}
    end = time.monotonic() + seconds
    with device.made_current(), torch.no_grad(), fusedres.backend(device.backend):
        events = events_seconds(clock, device.torch) if device.is_gpu else 0.0
        for step, every in steps.items():
            for work in distinct(step, every, gpu, known):
                key = (step, work.row.key)
                if key in done:
                    continue
                same = by_key.get(work.row.key)
                if same is not None:
                    row = replace(work.row, **{name: getattr(same, name) for name in _MEASURED})
                elif time.monotonic() > end:
                    row = replace(work.row, reason=TIME_OVER)
                else:
                    row = measure(work, device.torch, clock, events)
                done[key] = by_key[work.row.key] = row
                add(row)
                if row.reason and row.reason != TIME_OVER:
                    _recover(device)
    return list(done.values())


def _recover(device: Device) -> None:
    """Let go of a failed launch's memory; raises where the GPU is of no more use to this process."""
    gc.collect()
    if device.is_gpu:
        torch.cuda.synchronize(device.torch)
        torch.cuda.empty_cache()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusedres.bench.launches", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", default="resnet50", help="as `fusedres explain` takes it (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="images of a step (default: %(default)s)")
    parser.add_argument("--px", type=int, help="height and width of the images (default: the model's own)")
    parser.add_argument("--dtype", default="bf16", help="bf16 or fp16 (by autocast), or fp32 (default: %(default)s)")
    parser.add_argument("--infer", action="store_true", help="inference in place of a training step")
    parser.add_argument("--device", default="cuda", help="such as cuda:1, or vgpu:<target>, whose times mean nothing")
    parser.add_argument("--seconds", type=int, help="measure nothing more after so many")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="every row, written as it is finished")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="measured over predicted")
    parser.add_argument("--resume", action="store_true", help="keep the rows of an earlier run's CSV")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 1 if a launch failed or nothing was measured, 2 for wrong arguments, 3 if the GPU is lost."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        for name in ("batch", "px", "seconds"):
            if (value := getattr(options, name)) is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        check_file(options.csv, "csv", ".csv")
        check_file(options.plot, "plot", ".png")
        if options.plot is not None:
            check_packages("matplotlib")
        device = device_named(options.device)
        if not device.is_gpu and not device.executed_on_cpu:
            raise ValueError(f"device: expected a GPU, or vgpu:<target>, got {options.device!r}")
        gpu = _gpu(device)
        resumes = options.resume and options.csv is not None and options.csv.exists()
        rows = [row for row in read_launches(options.csv) if row.reason != TIME_OVER] if resumes else []
        for row in rows:
            if row.device != machine(device).device:
                raise ValueError(f"resume: expected rows of {machine(device).device}, got some of {row.device}")
        with fusedres.backend(device.backend):
            steps = steps_on_paper(options.model, options.batch, options.dtype, gpu, px=options.px, infer=options.infer)
    except ValueError as error:
        print(f"launches: error: {error}", file=sys.stderr)
        return 2
    found = list(rows)
    writer = None if options.csv is None else Writer(options.csv, rows)

    def add(row: TimedLaunch) -> None:
        found.append(row)
        if writer is not None:
            writer.add(row)

    status = 0
    try:
        run(steps, gpu, device, rows=rows, add=add, seconds=options.seconds or math.inf)
    except RuntimeError as error:
        print(f"the GPU takes no more work from this process: {error}", file=sys.stderr)
        status = DEVICE_LOST
    finally:
        if writer is not None:
            writer.close()
        print("\n".join(table(found, SHOWN)))
        if options.plot is not None and any(row.measured_s for row in found):
            options.plot.write_bytes(png(found))
    failed = any(row.reason for row in found) or not any(row.measured_s for row in found)
    return status or int(failed)


if __name__ == "__main__":
    sys.exit(main())
