"""A run of `fusedres bench`: what was asked for, its comparisons one after the other, and what is written of them."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from fusedres.arguments import check_file, check_packages
from fusedres.bench import cases, tables
from fusedres.bench import rows as statuses
from fusedres.bench.cases import Case, near
from fusedres.bench.contenders import Contender, contenders_named
from fusedres.bench.harness import DeviceLost, Measurement, compare
from fusedres.bench.machine import machine
from fusedres.bench.ops import OPS, op
from fusedres.bench.rows import Row, Writer, new_table, read_rows
from fusedres.bench.setting import DTYPES, Device, Setting, device_named
from fusedres.swap import fuse
from fusedres.swap.report import why_not_fused

__all__ = ["BenchOptions", "comparisons", "run"]

DEFAULT_CONTENDERS = ("eager", "compile", "fused")
DEVICE_LOST = 3
# On a CPU by kind of case: a training step of ResNet-50 takes 0.2 s an image there.
CPU_BATCH = {"network": 8, "block": 4, "op": 2}
EMULATED_BATCH = 1
QUICK = (("cifar_resnet20", 32, 32), ("resnet18", 8, 96), ("resnet50", 4, 96))


@dataclass(frozen=True)
class BenchOptions:
    """What `fusedres bench` was asked for; None and () are defaults that depend on the device."""

    model: Sequence[str] = ()
    block: Sequence[str] = ()
    op: Sequence[str] = ()
    contenders: Sequence[str] | None = None
    train: bool = False
    infer: bool = False
    dtype: Sequence[str] | None = None
    batch: int | None = None
    px: int | None = None
    device: str = "auto"
    quick: bool = False
    list: bool = False
    rounds: int | None = None
    seconds: int | None = None
    threads: int | None = None
    gate_only: bool = False
    csv: Path | None = None
    plot: Path | None = None
    html: Path | None = None
    resume: bool = False


Comparisons = list[tuple[Case, Setting]]
Progress = Callable[[], AbstractContextManager[Callable[[str, int, int], None]]]


def comparisons(options: BenchOptions, device: Device) -> Comparisons:
    """Every case under every setting that was asked for.

    Raises:
        ValueError: an unknown case or dtype, or nothing to run.
    """
    dtypes = options.dtype or (("bf16",) if device.is_gpu else ("fp32",))
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(near("dtype", dtype, DTYPES))
    modes = [mode for mode, only in (("train", options.train), ("infer", options.infer)) if only] or ["train", "infer"]
    if options.quick:
        sized: list[tuple[Case, int, int]] = [(cases.network(name), batch, px) for name, batch, px in QUICK]
    else:
        sized = [(case, _batch(options, case, device), options.px or case.px) for case in _cases(options)]
    if not sized:
        raise ValueError("model, block, op: expected at least one to run, such as --model resnet50; see --list")
    found: Comparisons = []
    for (case, batch, px), dtype in itertools.product(sized, dtypes):
        if isinstance(case, cases.ModelCase):
            cases.output_size(case, px)
        found += [(case, Setting(mode, dtype, batch, px, device)) for mode in case.modes if mode in (*modes, "op")]
    return found


def _check_fusable(wanted: Comparisons) -> None:
    """Refuse networks of which nothing is fused, on the meta device, before anything is run.

    Raises:
        ValueError: naming the first, and why.
    """
    for case in dict.fromkeys(case for case, _ in wanted):
        if isinstance(case, cases.ModelCase) and case.kind == "network":
            with warnings.catch_warnings():
                # What it would warn of is said in the error.
                warnings.simplefilter("ignore")
                why = why_not_fused(fuse(case.on_meta()))
            if why is not None:
                raise ValueError(f"model: {case.name}: {why}; --contenders eager,compile measures it as it is")


def _cases(options: BenchOptions) -> Iterator[Case]:
    yield from map(cases.network, options.model)
    yield from map(cases.block, cases.BLOCKS if tuple(options.block) == ("all",) else options.block)
    yield from map(op, OPS if tuple(options.op) == ("all",) else options.op)


def _batch(options: BenchOptions, case: Case, device: Device) -> int:
    if options.batch is not None:
        return options.batch
    if device.executed_on_cpu:
        return EMULATED_BATCH
    return case.batch if device.is_gpu else CPU_BATCH[case.kind]


def run(options: BenchOptions, progress: Progress = lambda: nullcontext(lambda *_: None)) -> int:
    """Run `fusedres bench` and return its exit status: 1 if a contender was refused or failed, 3 if the GPU is lost.

    Args:
        options: what was asked for.
        progress: around each comparison, a function of words, what is done of it, and what is to be done.
    """
    console = Console()
    if options.list:
        tables.print_registry(console)
        return 0
    if options.quick and (options.model or options.block or options.op):
        raise ValueError("quick: expected without --model, --block and --op, for it has its own")
    device = device_named(options.device)
    contenders = contenders_named(options.contenders or (("eager", "fused") if options.quick else DEFAULT_CONTENDERS))
    wanted = comparisons(options, device)
    if any(contender.schedule is not None for contender in contenders):
        _check_fusable(wanted)
    for path, name, suffix in (
        (options.csv, "csv", ".csv"), (options.plot, "plot", ".png"), (options.html, "html", ".html"),
    ):  # fmt: skip
        check_file(path, name, suffix)
    if options.plot is not None or options.html is not None:
        check_packages("matplotlib", *(() if options.html is None else ("jinja2",)))
    if options.resume and options.csv is None:
        raise ValueError("resume: expected together with --csv")
    kept = read_rows(options.csv) if options.resume and options.csv is not None and options.csv.exists() else []
    here = machine(device).device
    for row in kept:
        if row.device != here:
            raise ValueError(f"resume: expected rows of this machine's {here}, got some of {row.device}")
    threads = torch.get_num_threads()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rows = list(kept)
    try:
        status = _measure(options, device, contenders, wanted, rows, console, progress)
    finally:
        torch.set_num_threads(threads)
        _write_pictures(options, rows, console)
    tables.print_caveat(console, device)
    return status


def _measure(
    options: BenchOptions, device: Device, contenders: Sequence[Contender], wanted: Comparisons, rows: list[Row],
    console: Console, progress: Progress,
) -> int:  # fmt: skip
    """Add to ``rows``, and to the CSV as each comparison is finished."""
    measurement = Measurement(
        rounds=options.rounds or (20 if device.is_gpu else 5 if options.quick else 7),
        limit=options.seconds or math.inf,
        timed=not options.gate_only,
    )
    kept = {row.key: row for row in rows}
    with ExitStack() as stack:
        writer = None if options.csv is None else stack.enter_context(new_table(options.csv, rows))
        for case, setting in wanted:
            done = [c.name for c in contenders if _key(case, setting, c.name) in kept]
            if len(done) == len(contenders):
                continue
            try:
                with progress() as tell:
                    finished = compare(case, setting, contenders, measurement, done=done, tell=tell)
            except DeviceLost as lost:
                _note(lost.rows, rows, writer)
                console.print(f"the GPU takes no more work from this process: {lost}", style="bold red", markup=False)
                return DEVICE_LOST
            _note(finished, rows, writer)
            tables.print_comparison(console, finished)
    if options.quick:
        tables.print_counted(console)
    bad = [row for row in rows if row.status in (statuses.REFUSED, statuses.FAILED)]
    for row in bad:
        console.print(f"FAILED: {row.group}: {row.contender}: {row.status}: {row.reason}", markup=False, soft_wrap=True)
    return 1 if bad else 0


def _key(case: Case, setting: Setting, contender: str) -> statuses.Key:
    return statuses.Key(case.name, setting.mode, setting.dtype, setting.batch, setting.px, contender)


def _note(finished: list[Row], rows: list[Row], writer: Writer | None) -> None:
    rows += finished
    if writer is not None:
        writer.add(finished)


def _write_pictures(options: BenchOptions, rows: list[Row], console: Console) -> None:
    if not rows:
        return
    if options.csv is not None:
        console.print(f"written: {options.csv}", soft_wrap=True)
    if options.plot is not None:
        # Imported here: a run without pictures needs no matplotlib.
        from fusedres.bench import pictures

        drawn = pictures.write(options.plot, rows)
        console.print(f"written: {options.plot}" if drawn else "no picture: nothing was timed", soft_wrap=True)
    if options.html is not None:
        from fusedres.bench import page

        page.write(options.html, rows)
        console.print(f"written: {options.html}", soft_wrap=True)
