"""``fusedres compile MODEL``: the binaries of a first step, compiled before it for a GPU that need not be here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fusedres.compiler import folders
from fusedres.compiler.ahead import compile_ahead, cores, missing_of
from fusedres.compiler.binary import Binary
from fusedres.compiler.targets import TARGETS, require_triton, triton
from fusedres.explain.launched import DTYPES, Paper
from fusedres.models.sources import source
from fusedres.plan.gpus import GPUS, HERE, Gpu, gpu_named, target_gpu


@dataclass(frozen=True)
class Ahead:
    """What `fusedres compile MODEL` was asked for.

    Attributes:
        models: by name.
        target: of `compiler.TARGETS`, a GPU's name, or None for the GPU of this machine.
        out: a folder in place of Triton's cache.
        batch, px, dtype: of a step.
        infer: of inference alone, not of training too.
        tune: every candidate of tuning, too.
        jobs: processes; as many as there are cores if not given.
    """

    models: Sequence[str]
    target: str | None = None
    out: Path | None = None
    batch: int = 256
    px: int | None = None
    dtype: str = "bf16"
    infer: bool = False
    tune: bool = False
    jobs: int | None = None


def gpu_of(target: str | None) -> Gpu:
    """The GPU that a target stands for: of an architecture the first in the table.

    Raises:
        ValueError: there is none of this name.
    """
    if target is None or target.lower() == HERE:
        if not torch.cuda.is_available():
            raise ValueError(
                f"target: expected one of {', '.join(TARGETS)}, or a GPU such as h100, on a machine without a GPU"
            )
        return gpu_named(HERE)
    if target in TARGETS:
        return target_gpu(TARGETS[target])
    try:
        return gpu_named(target)
    except ValueError:
        raise ValueError(
            f"target: expected one of {', '.join(TARGETS)}, or a GPU such as {', '.join(list(GPUS)[:4])}, "
            f"got {target!r}"
        ) from None


def _write_down(options: Ahead, gpu: Gpu) -> None:
    """What a folder holds by now."""
    if options.out is not None:
        folders.write(options.out, gpu.target, options.models, folders.held(options.out, gpu.target))


def run(options: Ahead) -> int:
    """Compile, and say how many in how long; 1 if a binary does not compile.

    Raises:
        ValueError: what was asked wrongly, before anything is compiled.
    """
    require_triton()
    gpu = gpu_of(options.target)
    if options.dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {options.dtype!r}")
    if options.out is not None:
        folders.check(options.out)
    console = Console()
    start = time.perf_counter()
    papers = [
        Paper(source(name), gpu, options.batch, options.px, options.dtype, infer=options.infer)
        for name in options.models
    ]
    with console.status("listing binaries"):
        every: dict[Binary, None] = {}
        for paper in papers:
            for infer in (True,) if options.infer else (False, True):
                every.update(paper.binaries(infer=infer, tune=options.tune))
        _write_down(options, gpu)  # so that what is broken off can be taken up
        missing = missing_of(every, gpu.target, folder=options.out)
    listed = time.perf_counter() - start
    columns = TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("compiling", total=len(every))
        made = compile_ahead(
            every, gpu.target, folder=options.out, jobs=options.jobs,
            progress=lambda done, _: bar.update(task, completed=done),
        )  # fmt: skip
    failed = {binary: one.error for binary, one in made.items() if one.error is not None}
    compiled = sum(binary not in failed for binary in missing)
    _write_down(options, gpu)
    where = options.out.resolve() if options.out is not None else triton.knobs.cache.dir
    what = f"{len(every)} binaries of {', '.join(options.models)} for {gpu.target} ({gpu.name}, {options.dtype})"
    console.print(
        f"{what}: {compiled} compiled, {len(every) - len(missing)} were there, {len(failed)} failed; listed in "
        f"{listed:.1f} s, compiled in {time.perf_counter() - start - listed:.1f} s by "
        f"{options.jobs or cores()} processes",
        markup=False,
        soft_wrap=True,
    )
    console.print(f"written: {where}", markup=False, soft_wrap=True)
    for binary, error in failed.items():
        told = f"{binary.name} [{binary.variant} warps={binary.num_warps} stages={binary.num_stages}]"
        console.print(f"FAILED: {told}: {error}", markup=False, soft_wrap=True)
    return 1 if failed else 0
