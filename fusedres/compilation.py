"""The binaries that whole models launch, compiled for GPUs that are not here and held to budgets."""

from __future__ import annotations

import csv
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from .binaries import Figures, read_figures, violations
from .launch import Trace, record
from .models import cifar_resnet, preact_resnet
from .offline import TARGETS, Binary, compile_binary, require_triton, target_named
from .plan import AUTO, SCHEDULES
from .plan.tiles import MOST_TILES, listed
from .swap import fuse

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# One image as well: its row counts (49 pixels at the end of a ResNet) are not multiples of 16.
TRAINING_BATCH = 256
INFERENCE_BATCHES = (TRAINING_BATCH, 1)


class Model(NamedTuple):
    """A model that binaries are compiled for, and the side of the square images it takes."""

    build: Callable[[], nn.Module]
    side: int


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision import models

        model: nn.Module = models.get_model(name)
        return model

    return build


MODELS = {
    "resnet18": Model(_torchvision("resnet18"), 224),
    "resnet50": Model(_torchvision("resnet50"), 224),
    "resnext50_32x4d": Model(_torchvision("resnext50_32x4d"), 224),
    "cifar_resnet20": Model(lambda: cifar_resnet(20, fused=False), 32),
    "preact_resnet29": Model(lambda: preact_resnet(29), 32),
    "densenet121": Model(_torchvision("densenet121"), 224),
}


# A binary, and the name of a target that it is compiled for.
Task = tuple[Binary, str]


def recorded_binaries(
    models: Sequence[str], dtypes: Sequence[str], targets: Sequence[str], *, every_tile: bool = False
) -> dict[Task, list[str]]:
    """What training and inference launch on each of ``targets``, with the names of the models that launch it.

    The models run on the meta device, on every schedule. In 16 bits batch norm's parameters stay in fp32, which is
    what kernels see under autocast. ``every_tile``: with each tile in turn that the plan lists for tuning, and not
    with the default alone.

    Raises:
        ValueError: an unknown model, dtype or target.
    """
    _check_names("models", models, MODELS)
    _check_names("dtypes", dtypes, DTYPES)
    _check_names("targets", targets, TARGETS)
    users: dict[Task, list[str]] = {}
    runs = itertools.product(targets, models, dtypes, (AUTO, *SCHEDULES), range(MOST_TILES if every_tile else 1))
    for target, name, dtype, schedule, place in runs:
        with listed(place):
            trace = _dry_run(MODELS[name], DTYPES[dtype], schedule, target)
        for binary in dict.fromkeys(launch.binary for launch in trace.launches):
            launchers = users.setdefault((binary, target), [])
            if name not in launchers:
                launchers.append(name)
    return users


def _check_names(what: str, names: Sequence[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{what}: expected some of {', '.join(known)}, got {name!r}")


def _dry_run(model: Model, dtype: torch.dtype, schedule: str, target: str) -> Trace:
    """Everything launched by a training step and by inference on ``target``."""
    with torch.device("meta"):
        network = model.build().to(dtype).to(memory_format=torch.channels_last)
        images = torch.empty(TRAINING_BATCH, 3, model.side, model.side, dtype=dtype)
        images = images.contiguous(memory_format=torch.channels_last)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    fuse(network, schedule=schedule)
    with record(target) as trace:
        network.train()
        network(images).sum().backward()
        network.eval()
        with torch.no_grad():
            for batch in INFERENCE_BATCHES:
                network(images[:batch])
    return trace


@dataclass(frozen=True)
class Outcome:
    """One binary on one target: its figures if they were asked for, or why it has none."""

    binary: Binary
    target: str
    figures: Figures | None = None
    error: str | None = None

    @property
    def faults(self) -> list[str]:
        """What went wrong: the error, or the broken budgets."""
        if self.error is not None:
            return [self.error]
        return [] if self.figures is None else violations(self.binary, self.target, self.figures)


def compile_all(tasks: Sequence[Task], *, jobs: int | None = None, read: bool = True) -> Iterator[Outcome]:
    """Compile binaries, each for its target, in parallel; outcomes come in the order of ``tasks``.

    A binary that does not compile, or whose compiler crashes, has an outcome too. What was compiled before comes from
    Triton's cache, figures included.

    Args:
        tasks: what to compile, and for which of `offline.TARGETS`.
        jobs: processes; as many as there are cores if not given.
        read: whether to read figures.

    Raises:
        ValueError: an unknown target.
        Unavailable: Triton is missing, or what reads its binaries.
    """
    require_triton()
    for _, target in tasks:
        target_named(target)
    return _in_parallel(tasks, jobs or cores(), read)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def _in_parallel(tasks: Sequence[Task], jobs: int, read: bool) -> Iterator[Outcome]:
    pool = _pool(tasks, jobs)
    try:
        futures = [_submitted(pool, index, read) for index in range(len(tasks))]
        for task, future in zip(tasks, futures, strict=True):
            try:
                figures, error = future.result()
            except BrokenProcessPool:
                # A compiler that crashes takes the other workers with it. Alone, each task answers for itself.
                figures, error = _alone(task, read)
            yield Outcome(*task, figures, error)
    finally:
        pool.shutdown(cancel_futures=True)


def _submitted(pool: ProcessPoolExecutor, index: int, read: bool) -> Future[tuple[Figures | None, str | None]]:
    try:
        return pool.submit(_compile, index, read)
    except BrokenProcessPool as error:  # by a crash while tasks are still being handed in
        refused: Future[tuple[Figures | None, str | None]] = Future()
        refused.set_exception(error)
        return refused


def _alone(task: Task, read: bool) -> tuple[Figures | None, str | None]:
    with _pool([task], 1) as pool:
        try:
            return pool.submit(_compile, 0, read).result()
        except BrokenProcessPool:
            return None, "the compiler crashed"


_tasks: Sequence[Task] = ()


def _pool(tasks: Sequence[Task], jobs: int) -> ProcessPoolExecutor:
    # Forked workers inherit the tasks, for kernels can not be pickled, and need not import PyTorch again.
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), initializer=_inherit, initargs=(tasks,))


def _inherit(tasks: Sequence[Task]) -> None:
    global _tasks
    _tasks = tasks


def _compile(index: int, read: bool) -> tuple[Figures | None, str | None]:
    binary, target = _tasks[index]
    try:
        compiled = compile_binary(binary, target)
    except Exception as error:  # of the compiler's many kinds
        return None, f"does not compile: {type(error).__name__}: {error}"
    return (read_figures(compiled, target) if read else None), None


@dataclass(frozen=True)
class CompileOptions:
    """What `fusedres compile` was asked for. Without ``report`` only the cache is filled."""

    report: bool = False
    every_tile: bool = False
    targets: Sequence[str] = tuple(TARGETS)
    models: Sequence[str] = tuple(MODELS)
    dtypes: Sequence[str] = tuple(DTYPES)
    jobs: int | None = None
    csv: Path | None = None


def run(options: CompileOptions) -> int:
    """Run `fusedres compile` and return its exit status: 1 if a binary fails to compile or breaks a budget."""
    require_triton()
    _check_names("targets", options.targets, TARGETS)
    if options.csv is not None and not options.report:
        raise ValueError("csv: expected together with --report")
    if options.csv is not None and not options.csv.parent.is_dir():
        raise ValueError(f"csv must lie in an existing folder, got {options.csv}")
    console = Console()
    start = time.perf_counter()
    users = recorded_binaries(options.models, options.dtypes, options.targets, every_tile=options.every_tile)
    if not users:
        console.print("FAILED: these models launch no kernels, so that nothing was compiled")
        return 1
    binaries = sorted(
        dict.fromkeys(binary for binary, _ in users),
        key=lambda binary: (binary.name, binary.variant, binary.num_warps, binary.num_stages),
    )
    tasks = [(binary, target) for binary in binaries for target in options.targets if (binary, target) in users]
    outcomes = list(
        track(
            compile_all(tasks, jobs=options.jobs, read=options.report),
            "compiling",
            total=len(tasks),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
    )
    seconds = time.perf_counter() - start
    if options.report:
        # Into a file the table goes at full width: nobody reads it folded to 80 columns.
        (console if console.is_terminal else Console(width=200)).print(table(outcomes))
    if options.csv is not None:
        write_csv(options.csv, outcomes, users)
        console.print(f"written: {options.csv}", soft_wrap=True)
    console.print(
        f"{len(tasks)} binaries for {len(options.targets)} targets, recorded from "
        f"{', '.join(options.models)} in {', '.join(options.dtypes)}, in {seconds:.1f} s",
        soft_wrap=True,
    )
    failed = [outcome for outcome in outcomes if outcome.faults]
    for outcome in failed:
        name = f"{outcome.binary.name} [{_described(outcome.binary)}] on {outcome.target}"
        console.print(f"FAILED: {name}: {'; '.join(outcome.faults)}", markup=False, soft_wrap=True)
    return 1 if failed else 0


# Heading, field of `Figures` or None for what is put together, of each column of figures.
_COLUMNS = (
    ("registers", "registers"), ("scalar", "scalar_registers"), ("spilled", "spilled_registers"),
    ("spill B", None), ("stack B", "stack"), ("shared B", "shared"), ("tensor-core", "tensor_core"),
    ("async copy", "async_copies"), ("access B", "access"), ("issue", "issue"),
)  # fmt: skip


def table(outcomes: Sequence[Outcome]) -> Table:
    """One line per binary and target; a dash is what can not be read from that target's binaries."""
    caption = (
        "spill: bytes stored/loaded per thread; access: the widest to memory; "
        "issue: cycles to issue the main loop over cycles to multiply"
    )
    result = Table(title="Binaries", caption=caption)
    result.add_column("kernel", no_wrap=True)
    result.add_column("variant", overflow="fold", min_width=24)
    result.add_column("target", no_wrap=True)
    for heading, _ in _COLUMNS:
        result.add_column(heading, justify="right")
    result.add_column("budgets", no_wrap=True)
    previous = None
    for outcome in outcomes:
        binary, figures = outcome.binary, outcome.figures
        new = binary != previous
        if new and previous is not None:
            result.add_section()
        previous = binary
        result.add_row(
            binary.name if new else "",
            _described(binary) if new else "",
            outcome.target,
            *(_cell(figures, field) for _, field in _COLUMNS),
            "BROKEN" if outcome.faults else "kept",
        )
    return result


def _described(binary: Binary) -> str:
    return f"{binary.variant} warps={binary.num_warps} stages={binary.num_stages}"


def _cell(figures: Figures | None, field: str | None) -> str:
    if figures is None:
        return "-"
    if field is None:
        return f"{figures.spill_stores}/{figures.spill_loads}"
    value = getattr(figures, field)
    if isinstance(value, float):
        return f"{value:.2f}"
    return "-" if value is None else str(value)


def write_csv(path: Path, outcomes: Sequence[Outcome], users: Mapping[Task, Sequence[str]]) -> None:
    """Every figure of every binary on every target, an empty cell where there is none."""
    names = [field.name for field in fields(Figures)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["kernel", "variant", "num_warps", "num_stages", "models", "target", *names, "faults"])
        for outcome in outcomes:
            binary, target = outcome.binary, outcome.target
            figures = asdict(outcome.figures) if outcome.figures is not None else dict.fromkeys(names)
            writer.writerow([
                binary.name, binary.variant, binary.num_warps, binary.num_stages, " ".join(users[binary, target]),
                target, *figures.values(), "; ".join(outcome.faults),
            ])  # fmt: skip
