"""Runs `fusedres demo` and prints what it measures."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fusedres.arguments import check_file
from fusedres.train.digits import Digits, load_digits
from fusedres.train.twins import (
    ERROR_FACTOR,
    ForeignCheck,
    Twins,
    check_resnet50,
    differences,
    draw,
    saved_by_schedule,
    train_twins,
)


@dataclass(frozen=True)
class DemoOptions:
    """What `fusedres demo` was asked for. `min_accuracy` is a fraction, `threads` None PyTorch's choice."""

    epochs: int = 16
    batch: int = 64
    seed: int = 0
    out: Path = Path("fusedres-demo.png")
    threads: int | None = None
    px: int = 8
    schedule: str = "auto"
    min_accuracy: float = 0.97
    resnet50: bool = True


def run(options: DemoOptions) -> int:
    """Run the demonstration, print what it measured, and return 0 if every check passed, else 1.

    Raises:
        ValueError: an option is out of range, or the picture could not be written where asked.
        ImportError: scikit-learn is not installed.
    """
    if options.epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {options.epochs}")
    check_file(options.out, "out", ".png")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    start = time.perf_counter()
    console = Console(highlight=False)
    digits = load_digits(options.px)
    if not 1 <= options.batch <= len(digits.train_labels):
        raise ValueError(f"batch must be between 1 and {len(digits.train_labels)}, got {options.batch}")

    console.print(
        f"ResNet-20 on {len(digits.train_labels)} handwritten digits at {options.px} px, plain and fused from"
        f" seed {options.seed}, CPU, {torch.get_num_threads()} threads, torch {torch.__version__}",
        soft_wrap=True,
    )
    twins = _train_with_progress(console, digits, options)
    images, labels = digits.train_images[: options.batch], digits.train_labels[: options.batch]
    saved = saved_by_schedule(twins.plain.model, twins.fused.model, images, labels)
    console.print(_summary(twins, saved, options.batch))
    failures = [
        f"{twin.name} test accuracy {twin.accuracy:.2%} is below {options.min_accuracy:.0%}"
        for twin in (twins.plain, twins.fused)
        if twin.accuracy < options.min_accuracy
    ]

    check = None
    if options.resnet50:
        check = _check_with_progress(console, options)
        if check is not None and not check.passed:
            failures.append(f"resnet50: the fused model's error is more than {ERROR_FACTOR} times eager's")

    draw(options.out, twins, saved, check, batch=options.batch)
    console.print(f"picture: {options.out.resolve()}", soft_wrap=True)
    console.print(f"total time {time.perf_counter() - start:.0f} s")
    for failure in failures:
        console.print(f"FAILED: {failure}")
    return 1 if failures else 0


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _train_with_progress(console: Console, digits: Digits, options: DemoOptions) -> Twins:
    steps_per_epoch = len(digits.train_labels) // options.batch
    console.print("                                  largest difference of a step from plain")
    console.print("epoch   plain loss   fused loss   fused        plain in NCHW")
    with _progress(console) as progress:
        task = progress.add_task("training all", total=options.epochs * steps_per_epoch)

        def on_epoch(epoch: int, twins: Twins) -> None:
            plain, fused, control = (twin.losses[-steps_per_epoch:] for twin in twins)
            console.print(
                f"{epoch + 1:5d}{statistics.fmean(plain):13.6f}{statistics.fmean(fused):13.6f}"
                f"   {max(differences(fused, plain)):<13.1e}{max(differences(control, plain)):.1e}"
            )

        return train_twins(
            digits,
            epochs=options.epochs,
            batch=options.batch,
            seed=options.seed,
            schedule=options.schedule,
            on_step=lambda: progress.advance(task),
            on_epoch=on_epoch,
        )


def _summary(twins: Twins, saved: dict[str, float], batch: int) -> Table:
    table = Table("", *(twin.name for twin in twins))
    table.add_row("test accuracy", *(f"{twin.accuracy:.2%}" for twin in twins))
    table.add_row("time per step, median", *(f"{statistics.median(t.seconds) * 1e3:.1f} ms" for t in twins))
    megabytes = {name: f"{nbytes / 1e6:.2f} MB" for name, nbytes in saved.items()}
    table.add_row(f"saved for backward, batch of {batch}", megabytes["plain"], megabytes["fused"])
    table.add_row('the same with schedule="moments"', "", megabytes["fused, moments"])
    return table


def _check_with_progress(console: Console, options: DemoOptions) -> ForeignCheck | None:
    with _progress(console) as progress:
        task = progress.add_task("checking torchvision's resnet50", total=3)
        try:
            check = check_resnet50(
                options.seed,
                schedule=options.schedule,
                repeats=3,
                on_repeat=lambda: progress.advance(task),
            )
        except ImportError:
            check = None
    if check is None:
        console.print("torchvision is not installed, resnet50 is skipped: pip install fusedres[models]")
        return None
    console.print("\ntorchvision resnet50, random weights, fused in place")
    # Rich would wrap the table's lines and read brackets in it as markup.
    console.print(check.report, markup=False, soft_wrap=True)
    table = Table("relative error against fp64", "eager fp32", "fused fp32")
    for what, error in (("logits", check.output_error), ("gradients", check.gradient_error)):
        table.add_row(what, f"{error['eager']:.1e}", f"{error['fused']:.1e}")
    console.print(table)
    return check
