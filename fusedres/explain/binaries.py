"""The binaries that whole models launch, compiled for GPUs that are not here and held to budgets."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch
from torch import nn

from fusedres.compiler.binary import Binary, compile_binary
from fusedres.compiler.budgets import violations
from fusedres.compiler.figures import Figures, read_figures
from fusedres.compiler.targets import TARGETS, require_triton, target_named
from fusedres.explain.step import check_images
from fusedres.models import preact_resnet
from fusedres.models.sources import Source, source
from fusedres.patterns.choose import AUTO
from fusedres.plan.schedule import SCHEDULES
from fusedres.plan.tiles import MOST_TILES, listed
from fusedres.runtime.launch import Trace, record
from fusedres.swap import fuse
from fusedres.traffic.tensors import tensors_in

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# One image as well: its row counts (49 pixels at the end of a ResNet) are not multiples of 16.
TRAINING_BATCH = 256
INFERENCE_BATCHES = (TRAINING_BATCH, 1)


# What is compiled where no models are named.
MODELS = (
    "torchvision.resnet18", "torchvision.resnet50", "torchvision.resnext50_32x4d", "cifar_resnet20", "preact_resnet29",
    "torchvision.densenet121",
)  # fmt: skip
# Besides what `source` finds: the papers' are of the same shapes, and many times as deep.
SHALLOW = {"preact_resnet29": Source("preact_resnet29", lambda: preact_resnet(29), (3, 32, 32))}

# A binary, and the name of a target that it is compiled for.
Task = tuple[Binary, str]


def recorded_binaries(
    models: Sequence[str], dtypes: Sequence[str], targets: Sequence[str], *, every_tile: bool = False
) -> dict[Task, list[str]]:
    """What training and inference launch on each of ``targets``, with the names of the models that launch it.

    The models, named by the rule of `models.sources.source`, run on the meta device, on every schedule. In 16 bits
    batch norm's parameters stay in fp32, which is what kernels see under autocast. ``every_tile``: with each tile in
    turn that the plan lists for tuning, and not with the default alone.

    Raises:
        ValueError: an unknown model, dtype or target.
    """
    check_names("dtypes", dtypes, DTYPES)
    check_names("targets", targets, TARGETS)
    known = {name: model_named(name) for name in models}
    users: dict[Task, list[str]] = {}
    runs = itertools.product(targets, models, dtypes, (AUTO, *SCHEDULES), range(MOST_TILES if every_tile else 1))
    for target, name, dtype, schedule, place in runs:
        with listed(place):
            trace = _dry_run(known[name], DTYPES[dtype], schedule, target)
        for binary in dict.fromkeys(launch.binary for launch in trace.launches):
            launchers = users.setdefault((binary, target), [])
            if name not in launchers:
                launchers.append(name)
    return users


def model_named(name: str) -> Source:
    """The model that binaries are compiled for under this name.

    Raises:
        ValueError: there is none, or it takes something else than images.
    """
    if name in SHALLOW:
        return SHALLOW[name]
    found = source(name).of_images()
    check_images(found.on_meta(), torch.empty(2, *found.size, device="meta"), infer=False)
    return found


def check_names(what: str, names: Sequence[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{what}: expected some of {', '.join(known)}, got {name!r}")


def _dry_run(model: Source, dtype: torch.dtype, schedule: str, target: str) -> Trace:
    """Everything launched by a training step and by inference on ``target``."""
    network = model.on_meta().to(dtype)
    images = torch.empty(TRAINING_BATCH, *model.size, dtype=dtype, device="meta")
    images = images.contiguous(memory_format=torch.channels_last)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    fuse(network, schedule=schedule)
    with record(target) as trace:
        network.train()
        outputs = [output for output in tensors_in(network(images)) if output.requires_grad]
        torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
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
        tasks: what to compile, and for which of `compiler.TARGETS`.
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
