"""What `fusedres bench` prints: a table for each comparison, the registry, counted figures, and what they are not.

python -m fusedres.bench.tables bench.csv    # medians of a CSV as a Markdown table
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from fusedres.bench import cases
from fusedres.bench.contenders import CONTENDERS, YARDSTICK, contenders_named
from fusedres.bench.declared import declared, gpu_of
from fusedres.bench.ops import OPS
from fusedres.bench.rows import OK, Row, read_rows
from fusedres.bench.setting import Device, Setting, device_named
from fusedres.models.sources import names
from fusedres.tables import Column, Fitted

__all__ = [
    "EMULATED",
    "NO_GPU",
    "caveat",
    "markdown",
    "print_caveat",
    "print_comparison",
    "print_counted",
    "print_registry",
]

NO_GPU = (
    "No GPU was used. These are times of a CPU, where fused blocks run on library calls and none of the kernels; they "
    "say nothing of the kernels' speed."
)
EMULATED = (
    "No GPU was used. The kernels were compiled for one and executed on the CPU, so that the numbers they compute are "
    "checked, but their times mean nothing."
)
COUNTED = ("resnet50", "resnet18", "cifar_resnet56")
COUNTED_BATCH = 256

Cell = Callable[[Row], str]


def number(value: float | None, digits: int = 3, unit: float = 1.0) -> str:
    """Without a unit, to so many significant digits; a dash for None."""
    if value is None:
        return "-"
    scaled = value / unit
    return f"{scaled:.{digits}g}" if abs(scaled) < 10**digits else f"{scaled:.0f}"


def milliseconds(row: Row) -> str:
    """Median and quantiles."""
    if row.median_s is None or row.low_s is None or row.high_s is None:
        return "-"
    return f"{number(row.median_s, 4, 1e-3)} ({number(row.low_s, 4, 1e-3)} - {number(row.high_s, 4, 1e-3)})"


def verdict(row: Row) -> str:
    """The gate's error and bound."""
    if row.error is None:
        return "-"
    return f"{row.error:.1e}" + (f" <= {row.bound:.1e}" if row.bound is not None and row.status == OK else "")


# With the place at which each is left out of a narrow table, the last first.
COLUMNS: tuple[tuple[str, Cell, int], ...] = (
    ("ms (20 - 80 %)", milliseconds, 0),
    ("images/s", lambda row: number(row.images_per_s, 4), 3),
    ("x eager", lambda row: "-" if row.speedup is None else f"{row.speedup:.2f}", 0),
    ("first step s", lambda row: number(row.first_step_s, 3), 5),
    ("peak GB", lambda row: number(row.peak_bytes, 3, 1e9), 2),
    ("saved MB/image", lambda row: number(row.saved_bytes_per_image, 3, 1e6), 1),
    ("launches", lambda row: number(row.launches, 6), 6),
    ("GB/s", lambda row: number(row.gb_per_s, 3), 7),
    ("TFLOP/s", lambda row: number(row.tflop_per_s, 3), 8),
    ("of roofline", lambda row: "-" if row.of_roofline is None else f"{row.of_roofline:.0%}", 4),
    ("error", verdict, 9),
)


def print_comparison(console: Console, rows: Sequence[Row]) -> None:
    """One line for each contender; columns without any figure are left out."""
    if not rows:
        return
    shown = [
        Column(name, [cell(row) for row in rows], drop)
        for name, cell, drop in COLUMNS
        if any(cell(row) != "-" for row in rows)
    ]
    if shown and any(row.status != OK for row in rows):
        first = [cell if row.status == OK else row.status for row, cell in zip(rows, shown[0].cells, strict=True)]
        shown[0] = Column(shown[0].title, first)
    console.print(Fitted(rows[0].group, [Column("contender", [row.contender for row in rows], words=True), *shown]))
    for row in rows:
        if row.reason is not None:
            status = "" if row.status == OK else f"{row.status}: "
            console.print(f"  {row.contender}: {status}{row.reason}", markup=False, highlight=False)


def print_registry(console: Console) -> None:
    """Every case and contender."""
    for title, known in (
        ("networks of fusedres", names("fusedres")),
        ("networks of torchvision", names("torchvision")),
        ("and timm.NAME, path.py:function, path.py:Class, and of transformers", names("hf")),
        ("blocks", cases.BLOCKS),
        ("ops", OPS),
    ):
        console.print(f"{title}:", style="bold")
        console.print("  " + ", ".join(known), markup=False, highlight=False)
    console.print("contenders:", style="bold")
    for contender in CONTENDERS.values():
        console.print(f"  {contender.name:15} {contender.what}", markup=False, highlight=False)


def print_counted(console: Console) -> None:
    """Launches and bytes of a step at full size, by declaration; nothing is computed."""
    device = device_named("cpu")
    title = f"Counted, not measured: a step in bf16, batch {COUNTED_BATCH}, as {gpu_of(device).name} would run it"
    rows: list[tuple[str, ...]] = []
    for name in COUNTED:
        case = cases.network(name)
        for mode in case.modes:
            setting = Setting(mode, "bf16", COUNTED_BATCH, case.px, device)
            for contender in contenders_named(("fused",) if mode == "infer" else ("ladder",)):
                counted = declared(case, setting, contender)
                assert counted is not None
                rows.append((
                    name, mode, contender.name, str(counted.launches),
                    number(counted.nbytes / COUNTED_BATCH, 4, 1e6), number(counted.flops / COUNTED_BATCH, 4, 1e9),
                    str(counted.library_calls),
                ))  # fmt: skip
    titles = ("network", "mode", "contender", "launches", "MB/image", "GFLOP/image", "of the library")
    columns = [
        Column(name, cells, int(name == "of the library"), name in titles[:3])
        for name, cells in zip(titles, zip(*rows, strict=True), strict=True)
    ]
    console.print(Fitted(title, columns))
    console.print("The loss and the optimiser come on top; `fusedres explain` says more.", soft_wrap=True)


def caveat(device: Device) -> str | None:
    """What must be said beside figures of this device."""
    if device.executed_on_cpu:
        return EMULATED
    return None if device.is_gpu else NO_GPU


def print_caveat(console: Console, device: Device) -> None:
    said = caveat(device)
    if said is not None:
        console.print(said, style="bold", soft_wrap=True)


def markdown(rows: Sequence[Row]) -> str:
    """Milliseconds of a step, a line for each comparison and a column for each contender, with eager's multiple."""
    contenders = list(dict.fromkeys(row.contender for row in rows))
    groups: dict[str, dict[str, str]] = {}
    for row in rows:
        shown = row.status if row.median_s is None else f"{number(row.median_s, 4, 1e-3)}"
        if row.median_s is not None and row.speedup is not None and row.contender != YARDSTICK:
            shown += f" ({row.speedup:.2f}x)"
        groups.setdefault(row.group, {})[row.contender] = shown
    lines = ["| ms a step | " + " | ".join(contenders) + " |", "|---" * (len(contenders) + 1) + "|"]
    for name, cells in groups.items():
        lines.append(f"| {name} | " + " | ".join(cells.get(one, "-") for one in contenders) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fusedres.bench.tables", description="A CSV as a Markdown table.")
    parser.add_argument("csv", type=Path, nargs="+", help="written by fusedres bench")
    options = parser.parse_args(arguments)
    try:
        print(markdown([row for path in options.csv for row in read_rows(path)]))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
