"""What a training tells: a progress bar, a line per epoch, CSV, TensorBoard, and a picture of the curves."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Epoch", "Logs", "draw", "write_csv"]


class Epoch(NamedTuple):
    """One row of the log. Errors are fractions; ``held_out`` is the validation split if there is one, else the test.

    ``memory_mb`` is the most in use so far, ``seconds`` the duration of the epoch without testing.
    """

    epoch: int
    step: int
    lr: float
    train_loss: float
    train_error: float
    held_out_loss: float
    held_out_error: float
    held_out_error5: float
    images_per_second: float
    seconds: float
    memory_mb: float


def write_csv(path: Path, history: Sequence[Epoch]) -> None:
    """Write every row, over what was there: a resumed training leaves no row twice."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Epoch._fields)
        writer.writerows(history)
    os.replace(temporary, path)


def draw(path: Path, history: Sequence[Epoch], title: str, held_out: str) -> None:
    """One PNG: loss and error of training and held-out images over the iterations, and the learning rate."""
    from matplotlib.figure import Figure

    steps = [row.step for row in history]
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    losses, errors, rates = figure.subplots(1, 3, width_ratios=[2, 2, 1])
    marker = "." if len(history) < 40 else None
    for axes, name, factor in ((losses, "loss", 1), (errors, "error", 100)):
        for part, label, style in (("train", "training", "--"), ("held_out", held_out, "-")):
            values = [factor * getattr(row, f"{part}_{name}") for row in history]
            axes.plot(steps, values, style, color="tab:blue", marker=marker, label=label, linewidth=1)
        axes.set(xlabel="iteration", ylabel=name if factor == 1 else f"{name}, %")
        axes.legend()
        axes.grid(alpha=0.3)
    rates.plot(steps, [row.lr for row in history], color="tab:orange", drawstyle="steps-pre")
    rates.set(xlabel="iteration", ylabel="learning rate", yscale="log")
    figure.suptitle(title)
    temporary = path.with_name(path.name + ".partial")
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)


class Logs:
    """Where a training reports to. On ranks that do not write, and inside tests, ``folder`` is None and all is still.

    Args:
        folder: takes ``log.csv``, ``curves.png`` and ``tensorboard/``.
        console: for lines and the bar.
        title: of the picture.
        total: steps of the training.
        held_out: "validation" or "test".
        tensorboard: whether to write its files too.
        start: step at which the training goes on; what TensorBoard's files hold beyond it is dropped.

    Raises:
        ImportError: TensorBoard's package is missing.
    """

    def __init__(
        self,
        folder: Path | None,
        title: str,
        total: int,
        held_out: str,
        *,
        console: Console | None = None,
        tensorboard: bool = False,
        start: int = 0,
    ) -> None:
        self.folder, self.title, self.total, self.held_out = folder, title, total, held_out
        self.console = console or Console(highlight=False, soft_wrap=True, quiet=folder is None)
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[figures]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=self.console, transient=True, disable=folder is None or not self.console.is_terminal,
        )  # fmt: skip
        self.task: TaskID | None = None
        self.board: Any = None
        if tensorboard and folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("tensorboard is not installed: pip install fusedres[train]") from error
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)

    def __enter__(self) -> Logs:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        if self.board is not None:
            self.board.close()

    def step(self, step: int, epoch: int, lr: float, loss: float, error: float, speed: float, memory: int) -> None:
        """Move the bar, and write the curves of TensorBoard."""
        figures = f"loss {loss:.3f}  error {error:6.2%}  {speed:,.0f} images/s  {memory / 1e6:,.0f} MB"
        if self.task is None:
            self.task = self.progress.add_task("", total=self.total, completed=step, figures=figures)
        self.progress.update(self.task, completed=step, description=f"epoch {epoch}", figures=figures)
        if self.board is not None:
            for name, value in (("loss", loss), ("error", error), ("lr", lr), ("images_per_second", speed)):
                self.board.add_scalar(f"train/{name}", value, step)

    def epoch(self, history: Sequence[Epoch]) -> None:
        """Print the last row, and write all of them."""
        if self.folder is None:
            return
        row = history[-1]
        self.console.print(
            f"epoch {row.epoch:4d}  step {row.step:6d}  lr {row.lr:<8.4g} train loss {row.train_loss:.4f} error"
            f" {row.train_error:6.2%}   {self.held_out} loss {row.held_out_loss:.4f} error {row.held_out_error:6.2%}"
            f"   {row.images_per_second:,.0f} images/s",
            markup=False,
        )
        write_csv(self.folder / "log.csv", history)
        draw(self.folder / "curves.png", history, self.title, self.held_out)
        if self.board is not None:
            for name in ("loss", "error", "error5"):
                self.board.add_scalar(f"{self.held_out}/{name}", getattr(row, f"held_out_{name}"), row.step)
            self.board.flush()
