"""Compiles what models launch and reports on the binaries: a table, a CSV file, and what breaks its budget."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from fusedres.compiler.binary import Binary
from fusedres.compiler.figures import Figures
from fusedres.compiler.known import write
from fusedres.compiler.occupancy import occupancy
from fusedres.compiler.targets import TARGETS, require_triton
from fusedres.explain.binaries import (
    DTYPES,
    MODELS,
    Outcome,
    Recorded,
    Task,
    check_names,
    compile_all,
    recorded_binaries,
)


@dataclass(frozen=True)
class CompileOptions:
    """What `fusedres compile` was asked for. Without ``report`` only the cache is filled; ``known`` is the table that
    choices go by (`compiler.known`), whose rows of the targets are written anew."""

    report: bool = False
    every_tile: bool = False
    targets: Sequence[str] = tuple(TARGETS)
    models: Sequence[str] = MODELS
    dtypes: Sequence[str] = tuple(DTYPES)
    jobs: int | None = None
    csv: Path | None = None
    known: Path | None = None


def run(options: CompileOptions) -> int:
    """Run `fusedres compile` and return its exit status: 1 if a binary fails to compile or breaks a budget."""
    require_triton()
    check_names("targets", options.targets, TARGETS)
    if options.csv is not None and not options.report:
        raise ValueError("csv: expected together with --report")
    if options.known is not None and not options.report:
        raise ValueError("known: expected together with --report")
    if options.csv is not None and not options.csv.parent.is_dir():
        raise ValueError(f"csv must lie in an existing folder, got {options.csv}")
    console = Console()
    start = time.perf_counter()
    recorded = recorded_binaries(
        options.models,
        options.dtypes,
        options.targets,
        every_tile=options.every_tile,
        weighed=options.known is not None,
    )
    if not recorded:
        console.print("FAILED: these models launch no kernels, so that nothing was compiled")
        return 1
    binaries = sorted(
        dict.fromkeys(binary for binary, _ in recorded),
        key=lambda binary: (binary.name, binary.variant, binary.num_warps, binary.num_stages),
    )
    tasks = [(binary, target) for binary in binaries for target in options.targets if (binary, target) in recorded]
    outcomes = list(
        track(
            compile_all(tasks, jobs=options.jobs, read=options.report, limits=options.known is not None),
            "compiling",
            total=len(tasks),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
    )
    seconds = time.perf_counter() - start
    if options.report:
        # Into a file the table goes at full width: nobody reads it folded to 80 columns.
        (console if console.is_terminal else Console(width=280)).print(table(outcomes, recorded))
    if options.csv is not None:
        write_csv(options.csv, outcomes, recorded)
        console.print(f"written: {options.csv}", soft_wrap=True)
    if options.known is not None:
        rows = [(one.binary, one.target, one.limit, one.figures) for one in outcomes if one.figures is not None]
        console.print(f"written: {options.known}, {write(rows, options.known)} rows", soft_wrap=True)
    console.print(
        f"{len(tasks)} binaries for {len(options.targets)} targets, recorded from "
        f"{', '.join(options.models)} in {', '.join(options.dtypes)}, in {seconds:.1f} s",
        soft_wrap=True,
    )
    failed = [outcome for outcome in outcomes if outcome.faults]
    for outcome in failed:
        name = f"{outcome.binary.name} [{_described(outcome.binary)}] on {outcome.target}"
        console.print(f"FAILED: {name}: {'; '.join(outcome.faults)}", markup=False, soft_wrap=True)
    return 1 if failed else 0


# Heading, field of `Figures` or None for what is put together, of each column of figures.
_COLUMNS = (
    ("registers", "registers"), ("scalar", "scalar_registers"), ("spilled", "spilled_registers"),
    ("spill B", None), ("stack B", "stack"), ("shared B", "shared"), ("tensor-core", "tensor_core"),
    ("async copy", "async_copies"), ("access B", "access"), ("issue", "issue"), ("narrow", "narrow"), ("wgmma", None),
    ("outside", None), ("blocks", None), ("waves", None),
)  # fmt: skip


def table(outcomes: Sequence[Outcome], recorded: Mapping[Task, Recorded]) -> Table:
    """One line per binary and target; a dash is what can not be read from that target's binaries."""
    caption = (
        "spill: bytes stored/loaded per thread; access: the widest to memory; "
        "issue: cycles to issue the main loop over cycles to multiply; narrow: share of its bytes that come by less "
        "than 8 at a time; wgmma: messages that it waits; outside: instructions beside loops; blocks: on a "
        "multiprocessor at once, and what limits them; waves: of the largest launch on the common GPU of the target"
    )
    result = Table(title="Binaries", caption=caption)
    result.add_column("kernel", no_wrap=True)
    result.add_column("variant", overflow="fold", min_width=24)
    result.add_column("target", no_wrap=True)
    for heading, _ in _COLUMNS:
        result.add_column(heading, justify="right")
    result.add_column("budgets", no_wrap=True)
    previous = None
    for outcome in outcomes:
        binary, figures = outcome.binary, outcome.figures
        new = binary != previous
        if new and previous is not None:
            result.add_section()
        previous = binary
        result.add_row(
            binary.name if new else "",
            _described(binary) if new else "",
            outcome.target,
            *(_cell(figures, name) if name else _joined(heading, outcome, recorded) for heading, name in _COLUMNS),
            "BROKEN" if outcome.faults else "kept",
        )
    return result


def _described(binary: Binary) -> str:
    return f"{binary.variant} warps={binary.num_warps} stages={binary.num_stages}"


def _joined(heading: str, outcome: Outcome, recorded: Mapping[Task, Recorded]) -> str:
    figures = outcome.figures
    if figures is None:
        return "-"
    held = occupancy(outcome.binary.num_warps, figures.registers, figures.shared, outcome.target)
    together = held.blocks * TARGETS[outcome.target].multiprocessors
    task = outcome.binary, outcome.target
    return {
        "spill B": f"{figures.spill_stores}/{figures.spill_loads}",
        "wgmma": " ".join(figures.serialised),
        "outside": str(figures.code.straight.instructions),
        "blocks": f"{held.blocks} {held.limit}",
        "waves": f"{recorded[task].blocks / together:.2f}" if task in recorded else "-",
    }[heading]


def _cell(figures: Figures | None, field: str) -> str:
    if figures is None:
        return "-"
    value = getattr(figures, field)
    if isinstance(value, float):
        return f"{value:.2f}"
    return "-" if value is None else str(value)


def write_csv(path: Path, outcomes: Sequence[Outcome], recorded: Mapping[Task, Recorded]) -> None:
    """Every figure of every binary on every target, an empty cell where there is none."""
    names = [field.name for field in fields(Figures) if field.name != "code"]
    together = ("outside", "blocks", "waves")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["kernel", "variant", "num_warps", "num_stages", "models", "target", *names, *together, "faults"]
        )
        for outcome in outcomes:
            binary, target = outcome.binary, outcome.target
            figures = [getattr(outcome.figures, name, None) for name in names]
            figures += [_joined(heading, outcome, recorded) for heading in together]
            models = " ".join(recorded[binary, target].models)
            writer.writerow([
                binary.name, binary.variant, binary.num_warps, binary.num_stages, models, target, *figures,
                "; ".join(outcome.faults),
            ])  # fmt: skip
