"""Runs `fusedres demo` and prints what it measures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fusedres.arguments import check_file
from fusedres.tables import Column, Fitted
from fusedres.train.digits import Digits, load_digits
from fusedres.train.twins import (
    ERROR_FACTOR,
    ForeignCheck,
    Predicted,
    Twins,
    check_resnet50,
    differences,
    draw,
    saved_by,
    train_twins,
)

# What a training of so many epochs is held to.
ACCURACY, ENOUGH_EPOCHS = 0.97, 16


@dataclass(frozen=True)
class DemoOptions:
    """What `fusedres demo` was asked for.

    Attributes:
        threads: PyTorch's choice if None.
        min_accuracy: a fraction; None asks for `ACCURACY` of a training that is long enough for it, and for nothing of
            a shorter one.
    """

    epochs: int = 16
    batch: int = 64
    seed: int = 0
    out: Path = Path("fusedres-demo.png")
    threads: int | None = None
    px: int = 8
    schedule: str = "memory"
    min_accuracy: float | None = None
    resnet50: bool = True


def run(options: DemoOptions, predict: Callable[[], Predicted] | None = None) -> int:
    """Run the demonstration, print what it measured, and return 0 if every check passed, else 1.

    Args:
        options: what was asked for.
        predict: what is predicted of a GPU, shown apart from what was measured here.

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
    saved = saved_by(twins.plain.model, twins.fused.model, images, labels)
    console.print(_summary(twins, saved, options.batch))
    wanted = options.min_accuracy
    if wanted is None:
        wanted = ACCURACY if options.epochs >= ENOUGH_EPOCHS else 0.0
    failures = [
        f"{twin.name} test accuracy {twin.accuracy:.2%} is below {wanted:.0%}"
        for twin in (twins.plain, twins.fused)
        if twin.accuracy < wanted
    ]

    check = None
    if options.resnet50:
        check = _check_with_progress(console, options)
        if check is not None and not check.passed:
            failures.append(f"resnet50: the fused model's error is more than {ERROR_FACTOR} times eager's")

    predicted = None
    if predict is not None:
        with _progress(console) as progress:
            progress.add_task("predicting a GPU", total=None)
            predicted = predict()
    draw(options.out, twins, saved, check, predicted, batch=options.batch)
    console.print(f"On this machine, measured: {_gain(twins, saved, check, options.schedule)}")
    if predicted is not None:
        console.print(f"For a GPU, predicted and not measured: ResNet-50. {predicted.sentence}")
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


def _gain(twins: Twins, saved: dict[str, float], check: ForeignCheck | None, schedule: str) -> str:
    """What fusing gives here, and what it costs."""
    name, kept = "ResNet-20", saved
    if check is not None:
        name, kept = "torchvision's resnet50", check.saved_per_image
    plain, fused = (statistics.median(twin.seconds) for twin in (twins.plain, twins.fused))
    unit = "MB per image" if check is not None else "MB"
    return (
        f'fuse(model, schedule="{schedule}") lets {name} keep {kept["fused"] / 1e6:.1f} {unit} for backward instead of'
        f" {kept['plain'] / 1e6:.1f}, with the same numbers within rounding. On a CPU no kernels run: a step of"
        f" ResNet-20 takes {fused / plain:.2f} times as long as plain's here."
    )


def _summary(twins: Twins, saved: dict[str, float], batch: int) -> Fitted:
    rows = ("test accuracy", "time per step, median", f"saved for backward, batch of {batch}")
    names = {twins.plain.name: "plain", twins.fused.name: "fused"}
    cells = [
        [
            f"{twin.accuracy:.2%}", f"{statistics.median(twin.seconds) * 1e3:.1f} ms",
            f"{saved[names[twin.name]] / 1e6:.2f} MB" if twin.name in names else "",
        ]
        for twin in twins
    ]  # fmt: skip
    each = [Column(twin.name, column) for twin, column in zip(twins, cells, strict=True)]
    return Fitted("ResNet-20 on digits", [Column("", rows, words=True), *each])


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
    errors = (check.output_error, check.gradient_error)
    console.print(Fitted("relative error against fp64", [
        Column("", ("logits", "gradients"), words=True),
        Column("eager fp32", [f"{error['eager']:.1e}" for error in errors]),
        Column("fused fp32", [f"{error['fused']:.1e}" for error in errors]),
    ]))  # fmt: skip
    return check
