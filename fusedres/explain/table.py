"""An `Explanation` as tables for a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from rich.console import Group
from rich.table import Table

from fusedres.explain.explanation import Explanation, Figures
from fusedres.patterns.choose import AUTO
from fusedres.traffic.account import KINDS, bytes_by_kind

MEGA, GIGA = 1e6, 1e9


def tables(found: Explanation) -> Group:
    """The steps, what their bytes are spent on, their layers, the kernels of the last rung, and the choices."""
    last = list(found.rungs)[-1]
    parts = [_summary(found), _kinds(found), _layers(found), _kernels(found, last)]
    if AUTO in found.rungs and found.rungs[AUTO].choices:
        parts.append(_choices(found))
    return Group(*parts)


def _right(title: str, *columns: str, caption: str | None = None) -> Table:
    table = Table("", title=title, title_justify="left", caption=caption, caption_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _summary(found: Explanation) -> Table:
    question = found.question
    mode = "inference" if question.infer else "training step"
    title = (
        f"{question.model}, {mode}, batch {question.batch}, {'cast to ' * question.cast}{question.dtype}, "
        f"{' x '.join(map(str, question.size or ()))}, {found.gpu.name}; per image"
    )
    caption = (
        f"Computed, not measured: every kernel reads each input once and writes each output once. Roofline: "
        f"{found.gpu.bandwidth / 1e12:.2f} TB/s, {found.rate / 1e12:.0f} TFLOP/s ({found.gpu.source}), a bound.\n"
        f"Predicted: milliseconds of a step of {question.batch} by a model of time, from the compiled code of kernels "
        f"and the usual speed of a library, with its band."
    )
    if found.gpu.alike is not None:
        caption += f"\n{found.gpu.name} is not in the table of GPUs: its figures are {found.gpu.source}."
    known = {name: found.alike(step) for name, step in found.steps.items()}
    if any(known.values()):
        words = ", ".join(f"{name} {count}" for name, count in known.items() if count)
        caption += f"\nLaunches predicted from the code of another binary of their kernel: {words}."
    if not question.infer:
        caption += (
            f"\nEager's convolutions are counted as if both of their gradients read the output's at once; as kernels "
            f"read it, eager moves {(found.figures(found.eager).bytes_per_image + found.reread_per_image()) / MEGA:.1f}"
            f" MB.\nSGD with momentum would add {found.sgd_per_image() / MEGA:.1f} MB to every row."
        )
    columns = (
        "predicted ms", "band", "launches", "ours", "MB read", "MB written", "MB", "of eager", "GFLOP", "MB saved",
        "images/s at most",
    )  # fmt: skip
    table = _right(title, *columns, caption=caption)
    eager = found.figures(found.eager)
    for name, step in found.steps.items():
        figures = found.figures(step)
        table.add_row(
            name, f"{figures.predicted_ms:.2f}", "{:.1f}-{:.1f}".format(*figures.predicted_band_ms),
            str(figures.launches), str(sum(entry.ours for entry in step.entries)),
            f"{figures.read_per_image / MEGA:.1f}", f"{figures.written_per_image / MEGA:.1f}",
            f"{figures.bytes_per_image / MEGA:.1f}", f"{figures.bytes_per_image / eager.bytes_per_image:.2f}",
            f"{figures.flops_per_image / GIGA:.2f}", f"{figures.saved_bytes_per_image / MEGA:.1f}",
            f"{figures.roofline_images_per_s:,.0f}",
        )  # fmt: skip
    return table


def _kinds(found: Explanation) -> Table:
    by_step = {name: bytes_by_kind(step.entries) for name, step in found.steps.items()}
    kinds = [kind for kind in KINDS if any(totals[kind] for totals in by_step.values())]
    table = _right("MB per image by kind of work", *kinds)
    for name, totals in by_step.items():
        table.add_row(name, *(f"{totals[kind] / found.question.batch / MEGA:.1f}" for kind in kinds))
    return table


def _layers(found: Explanation) -> Table:
    table = _right("MB per image (launches) by layer", *found.steps)
    for name, by_step in _merged(found.layers()):
        cells = (
            f"{by_step[step].bytes_per_image / MEGA:.2f} ({by_step[step].launches})" if by_step[step].launches else ""
            for step in found.steps
        )
        table.add_row(name, *cells)
    return table


def _merged(layers: dict[str, dict[str, Figures]]) -> Iterator[tuple[str, dict[str, Figures]]]:
    """Layers, those in one row that follow each other with the same figures, which are each one's."""
    for figures, same in itertools.groupby(layers.items(), key=lambda item: item[1]):
        names = [name for name, _ in same]
        yield names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}, {len(names)} alike", figures


def _kernels(found: Explanation, rung: str) -> Table:
    table = _right(f"{rung}: MB per image by kernel", "launches", "MB", "of the roofline")
    for name, count, moved, share in found.operations(found.rungs[rung]):
        table.add_row(name, str(count), f"{moved / MEGA:.2f}", f"{share:.1%}")
    return table


def _choices(found: Explanation) -> Table:
    table = Table("layer", "rung", "why", title=f"{AUTO}: the choice of each layer", title_justify="left")
    choices = found.rungs[AUTO].choices
    for (rung, reason), same in itertools.groupby(
        choices.items(), key=lambda item: (item[1].schedule.name, item[1].reason)
    ):
        names = [name for name, _ in same]
        table.add_row(names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}", rung, reason)
    return table
