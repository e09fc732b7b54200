"""``fusedres tune``: what it prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fusedres.arguments import check_file, check_packages
from fusedres.commands.model_names import say_whose
from fusedres.commands.progress import progress
from fusedres.explain.step import check_images
from fusedres.models.sources import source
from fusedres.plan.gpus import gpu_named
from fusedres.runtime import plans
from fusedres.traffic.meta_autocast import meta_autocast
from fusedres.tuning.table import draw, notes, table
from fusedres.tuning.tune import estimate, tune
from fusedres.tuning.tuner import Unusable


def run(options: argparse.Namespace) -> int:
    """Tune, print, draw; ValueError for what was asked wrongly, before anything runs."""
    if options.show:
        return _show()
    if options.merge:
        return _merge(options.merge)
    if options.model is None:
        raise ValueError("model: expected one to tune, or --show or --merge")
    check_file(options.plot, "plot", ".png")
    check_file(options.out, "out", ".json")
    if options.plot is not None:
        check_packages("matplotlib")
    if options.out is not None and not options.predict:
        raise ValueError("out: expected --predict with it; what is measured is kept in the cache folder")
    if options.predict or not torch.cuda.is_available():
        return _on_paper(options)
    return _on_this_gpu(options)


def _on_this_gpu(options: argparse.Namespace) -> int:
    dtype, found = _dtype(options.dtype), source(options.model).of_images()
    say_whose([options.model])
    channels, height, width = found.size if options.px is None else (found.size[0], options.px, options.px)
    model = found.made().cuda().to(memory_format=torch.channels_last).train(not options.infer)
    images = torch.randn(options.batch, channels, height, width, device="cuda")
    images = images.contiguous(memory_format=torch.channels_last)
    autocast = torch.autocast("cuda", dtype=dtype) if dtype.itemsize == 2 else nullcontext()
    try:
        with autocast, torch.set_grad_enabled(not options.infer), _progress() as tell:
            told = tune(model, images, title=options.model, fresh=options.fresh, progress=tell)
    except Unusable as error:
        print(f"fusedres tune: error: the GPU failed ({error}); run it again, and it goes on", file=sys.stderr)
        return 1
    picture = options.plot
    if picture is None and told.path is not None:
        picture = told.path.with_suffix(".png")
    _print(told.title, told.blocks, told.step, picture)
    print(f"plan: {told.path or 'kept in memory only'}")
    return 0


def _on_paper(options: argparse.Namespace) -> int:
    dtype, gpu, found = _dtype(options.dtype), gpu_named(options.gpu), source(options.model).of_images()
    say_whose([options.model])
    channels, height, width = found.size if options.px is None else (found.size[0], options.px, options.px)
    images = torch.empty(options.batch, channels, height, width, device="meta")
    images = images.contiguous(memory_format=torch.channels_last)
    model = found.on_meta()
    check_images(model, images, infer=options.infer)
    with _progress() as tell:
        told = estimate(
            model, images, gpu, infer=options.infer, title=options.model, progress=tell,
            autocast=lambda: meta_autocast(dtype if dtype.itemsize == 2 else None),
        )  # fmt: skip
    title = f"{next(iter(told.plan.steps))}, {gpu.name}"
    kinds = _count(len(told.blocks), "kind")
    cost = (
        f"{kinds} of blocks, {told.candidates} candidates, {told.binaries} binaries to compile, about "
        f"{told.seconds:.0f} s on an {gpu.name} (predicted)"
    )
    if not options.predict:
        print(f"fusedres tune: PyTorch sees no GPU here; with one this would measure {cost}", file=sys.stderr)
        print("fusedres tune --predict writes the plan that is predicted", file=sys.stderr)
        return 2
    _print(title, told.blocks, told.step, options.plot, predicted=True)
    print(f"measuring would take: {cost}")
    path = options.out or plans.folder() / f"predicted-{gpu.name}.json"
    known = plans.read_or_set_aside(path) if options.out is None else None
    plan = told.plan
    if known is not None and known.why_not(gpu) is None:
        known.add(plan)
        plan = known
    if not plans.write(plan, path):
        return 1
    print(f"plan: {path}; fuse(model, plan={str(path)!r}) goes by it")
    return 0


def _dtype(name: str) -> Any:
    known = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if name not in known:
        raise ValueError(f"dtype: expected one of {', '.join(known)}, got {name!r}")
    return known[name]


def _print(title: str, blocks: Sequence[Any], step: Any, picture: Path | None, *, predicted: bool = False) -> None:
    console = Console(highlight=False)
    console.print(table(title, blocks, predicted=predicted))
    for line in notes(blocks, step):
        console.print(line, soft_wrap=True)
    if picture is not None:
        try:
            draw(picture, title, blocks, predicted=predicted)
        except ImportError:
            console.print("no picture: matplotlib is not installed (pip install fusedres[cli])")
        except OSError as error:
            console.print(f"no picture: {error}", soft_wrap=True)
        else:
            console.print(f"picture: {picture.resolve()}", soft_wrap=True)


@contextmanager
def _progress() -> Iterator[Callable[[Any], None]]:
    with progress() as tell:
        yield lambda told: tell(f"{told.words}{_gain(told)}", told.done, told.of)


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'s' * (number != 1)}"


def _gain(told: Any) -> str:
    return f"; {told.gained_ms:.2f} of {told.eager_ms:.2f} ms gained so far" if told.eager_ms else ""


def _show() -> int:
    found = plans.plans_here()
    print(f"{plans.folder()}: {_count(len(found), 'plan')}")
    for path, plan in found.items():
        if plan is None:
            print(f"{path.name}: no plan")
            continue
        made = ", ".join(f"{name} {value}" for name, value in plan.made_with.items() if value)
        print(f"{path.name}: {plan.words}; {len(plan.blocks)} blocks, {len(plan.decisions)} choices; {made}")
        for title, step in plan.steps.items():
            if "failed" in step:
                print(f"  {title}: {step['failed']}")
            else:
                eager, tuned = step["eager_ms"][1], step["tuned_ms"][1]
                print(f"  {title}: {eager:.3g} ms eager, {tuned:.3g} ms tuned, {eager / tuned:.2f} x")
    return 0


def _merge(files: Sequence[Path]) -> int:
    for path in plans.merge(files):
        print(f"written: {path}")
    return 0
