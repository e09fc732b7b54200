"""The binaries that whole models launch, compiled for GPUs that are not here and held to budgets."""

from __future__ import annotations

import itertools
import math
import multiprocessing
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import torch
from torch import nn

from fusedres.compiler.ahead import cores
from fusedres.compiler.binary import Binary
from fusedres.compiler.budgets import violations
from fusedres.compiler.figures import Figures, read_figures
from fusedres.compiler.known import compile_binary, limited
from fusedres.compiler.targets import TARGETS, Unavailable, require_triton, target_named
from fusedres.explain.step import check_images
from fusedres.models import preact_resnet
from fusedres.models.sources import Source, source
from fusedres.patterns.choose import AUTO, forget_choices
from fusedres.plan.schedule import SCHEDULES
from fusedres.plan.tiles import MOST_TILES, listed
from fusedres.runtime.launch import Trace, record
from fusedres.swap import fuse
from fusedres.traffic.predict import watching
from fusedres.traffic.tensors import tensors_in
from fusedres.traffic.weigh import forget

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


@dataclass
class Recorded:
    """Who launches a binary: models, and the most blocks of a launch."""

    models: list[str] = field(default_factory=list)
    blocks: int = 0


def recorded_binaries(
    models: Sequence[str],
    dtypes: Sequence[str],
    targets: Sequence[str],
    *,
    every_tile: bool = False,
    weighed: bool = False,
) -> dict[Task, Recorded]:
    """What training and inference launch on each of ``targets``, and who launches it.

    The models, named by the rule of `models.sources.source`, run on the meta device, on every schedule. In 16 bits
    batch norm's parameters stay in fp32, which is what kernels see under autocast. ``every_tile``: with each tile in
    turn that the plan lists for tuning, and not with the default alone. ``weighed``: what the choice by time looked at,
    too, and did not take.

    Raises:
        ValueError: an unknown model, dtype or target.
    """
    check_names("dtypes", dtypes, DTYPES)
    check_names("targets", targets, TARGETS)
    known = {name: model_named(name) for name in models}
    found: dict[Task, Recorded] = {}
    runs = itertools.product(targets, models, dtypes, (AUTO, *SCHEDULES), range(MOST_TILES if every_tile else 1))
    for target, name, dtype, schedule, place in runs:
        with listed(place):
            trace = _dry_run(known[name], DTYPES[dtype], schedule, target, weighed)
        for one in trace.launches:
            recorded = found.setdefault((one.binary, target), Recorded())
            recorded.blocks = max(recorded.blocks, math.prod(one.grid))
            if name not in recorded.models:
                recorded.models.append(name)
    return found


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


def _dry_run(model: Source, dtype: torch.dtype, schedule: str, target: str, everything: bool = False) -> Trace:
    """Everything launched by a training step and by inference on ``target``; if asked, all that is weighed, too."""
    network = model.on_meta().to(dtype)
    images = torch.empty(TRAINING_BATCH, *model.size, dtype=dtype, device="meta")
    images = images.contiguous(memory_format=torch.channels_last)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    fuse(network, schedule=schedule)
    forget()
    forget_choices()
    with record(target) as trace, watching() as weighed:
        network.train()
        outputs = [output for output in tensors_in(network(images)) if output.requires_grad]
        torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
        network.eval()
        with torch.no_grad():
            for batch in INFERENCE_BATCHES:
                network(images[:batch])
    trace.launches.extend(weighed if everything else [])
    return trace


@dataclass(frozen=True)
class Outcome:
    """One binary on one target: its figures if they were asked for, or why it has none.

    ``limit``: of registers, where one was looked for (`known.limited`).
    """

    binary: Binary
    target: str
    figures: Figures | None = None
    error: str | None = None
    limit: int = 0

    @property
    def faults(self) -> list[str]:
        """What went wrong: the error, or the broken budgets."""
        if self.error is not None:
            return [self.error]
        return [] if self.figures is None else violations(self.binary, self.target, self.figures)


def compile_all(
    tasks: Sequence[Task], *, jobs: int | None = None, read: bool = True, limits: bool = False
) -> Iterator[Outcome]:
    """Compile binaries, each for its target, in parallel; outcomes come in the order of ``tasks``.

    A binary that does not compile, or whose compiler crashes, has an outcome too. What was compiled before comes from
    Triton's cache, figures included.

    Args:
        tasks: what to compile, and for which of `compiler.TARGETS`.
        jobs: processes; as many as there are cores if not given.
        read: whether to read figures.
        limits: whether to look for limits of registers, in place of those that are known.

    Raises:
        ValueError: an unknown target.
        Unavailable: Triton is missing, or what reads its binaries.
    """
    require_triton()
    for _, target in tasks:
        target_named(target)
    return _in_parallel(tasks, jobs or cores(), _limited if limits else _read if read else _made)


Result = tuple[Figures | None, str | None, int]
Job = Callable[[Binary, str], Result]


def _in_parallel(tasks: Sequence[Task], jobs: int, job: Job) -> Iterator[Outcome]:
    pool = _pool(tasks, jobs)
    try:
        futures = [_submitted(pool, index, job) for index in range(len(tasks))]
        for task, future in zip(tasks, futures, strict=True):
            try:
                figures, error, limit = future.result()
            except BrokenProcessPool:
                # A compiler that crashes takes the other workers with it. Alone, each task answers for itself.
                figures, error, limit = _alone(task, job)
            yield Outcome(*task, figures, error, limit)
    finally:
        pool.shutdown(cancel_futures=True)


def _submitted(pool: ProcessPoolExecutor, index: int, job: Job) -> Future[Result]:
    try:
        return pool.submit(_compile, index, job)
    except BrokenProcessPool as error:  # by a crash while tasks are still being handed in
        refused: Future[Result] = Future()
        refused.set_exception(error)
        return refused


def _alone(task: Task, job: Job) -> Result:
    with _pool([task], 1) as pool:
        try:
            return pool.submit(_compile, 0, job).result()
        except BrokenProcessPool:
            return None, "the compiler crashed", 0


_tasks: Sequence[Task] = ()


def _pool(tasks: Sequence[Task], jobs: int) -> ProcessPoolExecutor:
    # Forked workers inherit the tasks, for kernels can not be pickled, and need not import PyTorch again.
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), initializer=_inherit, initargs=(tasks,))


def _inherit(tasks: Sequence[Task]) -> None:
    global _tasks
    _tasks = tasks


def _compile(index: int, job: Job) -> Result:
    try:
        return job(*_tasks[index])
    except Unavailable:
        raise
    except Exception as error:  # of the compiler's many kinds
        return None, f"does not compile: {type(error).__name__}: {error}", 0


def _made(binary: Binary, target: str) -> Result:
    compile_binary(binary, target)
    return None, None, 0


def _read(binary: Binary, target: str) -> Result:
    return read_figures(compile_binary(binary, target), target), None, 0


def _limited(binary: Binary, target: str) -> Result:
    limit, figures = limited(binary, target)
    return figures, None, limit
