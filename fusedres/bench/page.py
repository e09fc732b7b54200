"""One HTML page with the rows, the pictures and what to make of them; it needs no network and no script."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from fusedres.bench import launches, pictures, tables
from fusedres.bench.contenders import CONTENDERS
from fusedres.bench.launches import TimedLaunch
from fusedres.bench.published import beside
from fusedres.bench.rows import OK, Row

__all__ = ["render", "write"]

ALT = {
    "speed-ups": "bars: the speed of each contender as a multiple of eager PyTorch's, for each comparison",
    "roofline": "points: achieved TFLOP/s over FLOP per byte, below the lines of what this machine can do",
    "memory": "bars: megabytes per image of each contender, for each comparison",
}
MACHINE = (
    "device",
    "processor",
    "threads",
    "driver",
    "python",
    "torch",
    "triton",
    "cuda",
    "cudnn",
    "fusedres",
    "commit",
)


def render(rows: Sequence[Row], timed_launches: Sequence[TimedLaunch] = ()) -> str:
    """The page's source; launches of a step, predicted against measured, come first.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("rows: expected at least one, got none")
    environment = Environment(
        loader=PackageLoader("fusedres.bench", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    shown = [(name, cell) for name, cell, _ in tables.COLUMNS if any(cell(row) != "-" for row in rows)]
    emulated = any(row.device.startswith("vgpu") for row in rows)
    on_gpu = any(row.driver or row.cudnn for row in rows)
    return environment.get_template("page.html.jinja").render(
        caveat=tables.EMULATED if emulated else None if on_gpu else tables.NO_GPU,
        machines=[dict(zip(MACHINE, values, strict=True)) for values in _machines(rows)],
        first=min(row.date for row in rows),
        last=max(row.date for row in rows),
        groups=groups,
        columns=[name for name, _ in shown],
        cells={row.key: [cell(row) for _, cell in shown] for row in rows},
        ok=OK,
        launches={
            "sums": launches.sums(timed_launches),
            "head": launches.HEAD,
            "cells": launches.cells(timed_launches),
            "picture": base64.b64encode(launches.png(timed_launches)).decode("ascii"),
        }
        if timed_launches
        else None,
        pictures=[
            (name, ALT[name], base64.b64encode(pictures.png(name, rows)).decode("ascii"))
            for name in pictures.worth(rows)
        ],
        contenders=[one for name, one in CONTENDERS.items() if any(row.contender == name for row in rows)],
        published=beside(rows),
    )


def _machines(rows: Sequence[Row]) -> list[tuple[object, ...]]:
    """Each machine that rows come from, once."""
    return list(dict.fromkeys(tuple(getattr(row, name) for name in MACHINE) for row in rows))


def write(path: Path, rows: Sequence[Row], timed_launches: Sequence[TimedLaunch] = ()) -> None:
    """Write `render`."""
    path.write_text(render(rows, timed_launches), encoding="utf-8")
