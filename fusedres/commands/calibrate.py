"""``fusedres calibrate``: the model of time, fitted to the launches that were timed on a GPU."""

from __future__ import annotations

import argparse
import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fusedres.arguments import check_file
from fusedres.bench.launches import TimedLaunch, read_launches
from fusedres.cache import write_json
from fusedres.plan import calibrate, constants
from fusedres.plan.calibrate import Errors, Fit, Sample
from fusedres.plan.gpus import GPUS, HERE, Gpu, forget_measured, gpu_named
from fusedres.plan.time import constants_of

TABLE = "launches.csv"
RESULTS = Path("bench/results")


def run(options: argparse.Namespace) -> int:
    """Fit, print, write; 1 where the times tell of nothing. ValueError for what was asked wrongly, before that."""
    if options.show or options.reset:
        if options.file is not None or options.out is not None or (options.show and options.reset):
            raise ValueError("show, reset: expected alone, or with --gpu")
        return _show(options.gpu) if options.show else _reset(options.gpu)
    check_file(options.out, "out", ".json")
    path = _table(options.file)
    rows = read_launches(path)
    gpu = _gpu(rows, options.gpu, path)
    samples, left_out = _samples(rows)
    for why, count in left_out.items():
        print(f"left out: {count} {why}")
    found = calibrate.fit(samples, gpu)
    print("\n".join(_lines(gpu, samples, found)))
    if not found.values:
        print("these times determine none of the constants: nothing is written")
        return 1
    kept = constants.Constants(
        gpu.name, gpu.multiprocessors, found.values,
        datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), _made_with(rows), len(samples),
    )  # fmt: skip
    out = options.out or constants.path_for(gpu.name, gpu.multiprocessors)
    if not write_json(kept.as_json(), out):
        return 1
    print(f"written: {out}")
    if options.out is None:
        forget_measured()
        print(f"predictions for {gpu.name} on this machine go by it from now on; --reset --gpu NAME undoes it")
    return 0


def _table(path: Path | None) -> Path:
    """The table of launches that is meant.

    Raises:
        ValueError: there is none, or there are several.
    """
    if path is None:
        found = sorted(RESULTS.glob(f"*/{TABLE}"))
        if len(found) != 1:
            told = ", ".join(map(str, found)) or f"none in {RESULTS}"
            raise ValueError(f"file: expected a table of timed launches, such as make gpu leaves; here: {told}")
        return found[0]
    if path.is_dir():
        if not (path / TABLE).exists():
            raise ValueError(f"file: expected a folder of results with {TABLE}, got {path}")
        return path / TABLE
    return path


def _gpu(rows: Sequence[TimedLaunch], asked: str | None, path: Path) -> Gpu:
    """The GPU that a table is of.

    Raises:
        ValueError: it is of none, of several, of one whose times mean nothing, or of another than was asked for.
    """
    of = dict.fromkeys((row.gpu, row.multiprocessors) for row in rows)
    if len(of) != 1:
        names = ", ".join(name for name, _ in of) or "of none"
        raise ValueError(f"file: expected launches of one GPU, got {names} in {path}")
    name, multiprocessors = next(iter(of))
    emulated = next((row.device for row in rows if row.device.endswith("emulated")), None)
    if emulated is not None:
        raise ValueError(f"file: expected times of a GPU, got some of {emulated}, which mean nothing")
    try:
        gpu = gpu_named(asked or (name if name in GPUS else HERE))
    except ValueError as error:
        if asked is not None:
            raise
        raise ValueError(f"file: expected launches of a GPU in the table of GPUs or here, got {name}") from error
    if (gpu.name, gpu.multiprocessors) != (name, multiprocessors):
        raise ValueError(
            f"gpu: expected {name} with {multiprocessors} multiprocessors, which {path} is of, got {gpu.name} with "
            f"{gpu.multiprocessors}"
        )
    return gpu


def _samples(rows: Sequence[TimedLaunch]) -> tuple[list[Sample], dict[str, int]]:
    """What can be fitted to, each launch once however many steps make it; and how many were left out, by reason."""
    samples: list[Sample] = []
    left_out: dict[str, int] = {}
    for row in {row.key: row for row in rows}.values():
        seconds = row.measured_s
        why = None
        if seconds is None:
            why = "without a time"
        elif not (math.isfinite(seconds) and seconds > 0):
            why = "whose time is no number above 0"
        elif not row.work or not row.known:
            why = "of which only a binary like theirs is known"
        if why is not None:
            left_out[why] = left_out.get(why, 0) + 1
        elif seconds is not None:
            samples.append(Sample(row.kind, calibrate.read(row.work), seconds))
    return samples, left_out


def _lines(gpu: Gpu, samples: Sequence[Sample], found: Fit) -> list[str]:
    usual = constants_of(replace(gpu, measured={}))
    lines = [f"{gpu.name}: {len(samples)} launches", "", f"{'constant':26}{'usual':>12}{'measured':>12}"]
    for name, value in usual.items():
        measured = f"{found.values[name]:12.4g}" if name in found.values else f"  left alone: {found.left[name]}"
        lines.append(f"{name:26}{value:12.4g}{measured}")
    lines += ["", f"{'predicted off by a factor':26}{'launches':>9}{'before':>20}{'after':>20}"]
    lines.append(f"{'':35}{'median':>10}{'90 %':>10}{'median':>10}{'90 %':>10}")
    lines += [
        f"{kind:26}{before.samples:9}{_factors(before)}{_factors(found.after[kind])}"
        for kind, before in found.before.items()
    ]
    return lines


def _factors(errors: Errors) -> str:
    return f"{math.exp(errors.median):10.2f}{math.exp(errors.most):10.2f}"


def _made_with(rows: Sequence[TimedLaunch]) -> Mapping[str, str]:
    try:
        own = version("fusedres")
    except PackageNotFoundError:  # a source tree that was never installed
        own = "0+unknown"
    names = ("device", "driver", "torch", "triton", "cudnn", "commit")
    return {"fusedres": own, **{name: getattr(rows[0], name) for name in names}}


def _show(asked: str | None) -> int:
    """Print what is kept, of one GPU or of all."""
    gpu = None if asked is None else gpu_named(asked)
    paths = (
        sorted(constants.folder().glob("*.json")) if gpu is None
        else [constants.path_for(gpu.name, gpu.multiprocessors)]
    )  # fmt: skip
    shown = 0
    for path in paths:
        try:
            kept = constants.read(path)
        except FileNotFoundError:
            continue
        except (OSError, constants.NotConstants) as error:
            print(f"{path}: not used: {error}")
            continue
        shown += 1
        print(f"{kept.gpu}: {kept.launches} launches, {kept.date}, {path}")
        print("".join(f"  {name:26}{value:12.4g}\n" for name, value in kept.values.items()), end="")
    if not shown:
        print(f"none{'' if gpu is None else f' of {gpu.name}'}: predictions go by the model's own constants")
    return 0


def _reset(asked: str | None) -> int:
    """Remove what is kept of a GPU."""
    if asked is None:
        raise ValueError("reset: expected with --gpu, the GPU whose constants are let go of, such as --gpu here")
    gpu = gpu_named(asked)
    path = constants.path_for(gpu.name, gpu.multiprocessors)
    try:
        path.unlink()
    except FileNotFoundError:
        print(f"none of {gpu.name}: predictions go by the model's own constants")
        return 0
    except OSError as error:
        raise ValueError(f"reset: {path} can not be removed: {error.strerror}") from error
    forget_measured()
    print(f"removed: {path}")
    return 0
