"""``fusedres predict``: a model's step on many GPUs and batches, eager and fused, as the model of time has it."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fusedres.arguments import check_file
from fusedres.commands.progress import progress
from fusedres.explain.explanation import Question, explain
from fusedres.models.sources import source
from fusedres.patterns.choose import AUTO


@dataclass(frozen=True)
class Row:
    """A step on one GPU: milliseconds, optimistic, central and pessimistic, and what each layer runs on.

    ``alike``: launches whose code was taken from a binary like theirs, of a related target perhaps. ``measured``:
    whether constants of the model were measured on that GPU.
    """

    gpu: str
    batch: int
    infer: bool
    eager: tuple[float, float, float]
    auto: tuple[float, float, float]
    launches: int
    alike: int
    saved_mb: float
    choices: tuple[tuple[str, str], ...]
    measured: bool = False

    @property
    def gain(self) -> float:
        return self.eager[1] / self.auto[1]


def run(options: argparse.Namespace) -> int:
    """Predict and print; ValueError for what was asked wrongly, before anything is printed."""
    out: Path | None = options.out
    check_file(out, "out", ".md")
    rows: list[Row] = []
    steps = 2 * len(options.gpus) * len(options.batches)
    with progress(lines=10) as tell:
        for row in predictions(options.model, options.gpus, options.batches, options.dtype):
            rows.append(row)
            tell(f"{row.gpu}, batch {row.batch}", len(rows), steps)
    text = page(options.model, options.dtype, rows)
    if out is None:
        print(text)
    else:
        out.write_text(text)
        print(f"written: {out.resolve()}")
    return 0


def predictions(model: str, gpus: Sequence[str], batches: Sequence[int], dtype: str) -> Iterator[Row]:
    """A row for each GPU, batch, training and inference."""
    found = source(model)
    for infer, gpu, batch in itertools.product((False, True), gpus, batches):
        told = explain(Question(model, batch, dtype, gpu, (AUTO,), infer), model=found)
        step = told.rungs[AUTO]
        eager, auto = told.figures(told.eager), told.figures(step)
        yield Row(
            told.gpu.name, batch, infer,
            (eager.predicted_band_ms[0], eager.predicted_ms, eager.predicted_band_ms[1]),
            (auto.predicted_band_ms[0], auto.predicted_ms, auto.predicted_band_ms[1]),
            auto.launches, told.alike(step), auto.saved_bytes_per_image / 1e6,
            tuple((name, choice.schedule.name) for name, choice in step.choices.items()), bool(told.gpu.measured),
        )  # fmt: skip


def page(model: str, dtype: str, rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        f"# {model}, predicted",
        "",
        f"`fusedres predict {model} --dtype {dtype}` wrote this page. **Predicted, not measured**: milliseconds of a",
        "step by the model of `fusedres/plan/time.py`, from the compiled code of kernels and the usual speed of",
        "a library's calls, in brackets by its optimistic and its pessimistic assumptions. Small batches take as long",
        "as Python takes to start their launches, 10 us each; a CUDA graph spares that, eager or fused. Without",
        "optimiser, loss and data. Alike are launches that are predicted from the code of another binary of their",
        "kernel: where they are many, as on targets that the table of binaries does not hold, a figure says less.",
        "",
    ]
    if any(row.measured for row in rows):
        lines += ["*: by constants of the model that were measured on that GPU (`fusedres calibrate`).", ""]
    for infer in (False, True):
        chosen = [row for row in rows if row.infer is infer]
        if not chosen:
            continue
        lines += [
            f"## {'Inference' if infer else 'Training'}",
            "",
            "| GPU | batch | eager ms | `auto` ms | faster by | images/s | launches (alike) | MB kept | choices |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row.gpu}{' *' if row.measured else ''} | {row.batch} | {_band(row.eager)} | {_band(row.auto)} "
            f"| {row.gain:.2f} x "
            f"| {1e3 * row.batch / row.auto[1]:,.0f} | {row.launches} ({row.alike}) | {row.saved_mb:.1f} "
            f"| {_choices(row.choices)} |"
            for row in chosen
        ]
        lines.append("")
    return "\n".join(lines)


def _band(ms: tuple[float, float, float]) -> str:
    optimistic, central, pessimistic = ms
    return f"{central:.3g} ({optimistic:.3g}-{pessimistic:.3g})"


def _choices(choices: Sequence[tuple[str, str]]) -> str:
    """Layers that follow each other with one choice together."""
    words = []
    for rung, same in itertools.groupby(choices, key=lambda choice: choice[1]):
        layers = [name for name, _ in same]
        words.append(f"{layers[0] if len(layers) == 1 else f'{layers[0]}-{layers[-1]}'} {rung}")
    return ", ".join(words)
