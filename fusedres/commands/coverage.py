"""``fusedres coverage``: how many batch norms of the models of other libraries are in a fused pass, and why not all."""

from __future__ import annotations

import argparse
import csv
import io
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import astuple, dataclass, fields
from importlib.metadata import version
from pathlib import Path

import torch

from fusedres.arguments import check_file, check_packages
from fusedres.models.sources import PACKAGES, names, source
from fusedres.swap import fuse, report

LIBRARIES = ("torchvision", "timm", "hf")
MOSTLY = 0.9
"""The fraction of its batch norms in fused passes from which on a model counts as fused for the most part."""
CHUNK = 12
"""Models that a process measures before it is asked again."""


@dataclass(frozen=True)
class Covered:
    """What of a model is fused.

    Attributes:
        model: as `fusedres.models.sources` takes it, with its library.
        family: the module of the library that has its class.
        norms: how many batch norms of images it has; with none, or not built, a model is not counted.
        fused: how many of these are in a fused pass.
        why: the most frequent reason of the others, or why it was not built.
    """

    model: str
    family: str
    norms: int
    fused: int
    why: str = ""

    @property
    def mostly(self) -> bool:
        return self.fused >= MOSTLY * self.norms


def run(options: argparse.Namespace) -> int:
    """Measure and print or write; ValueError for what was asked wrongly, before anything is measured."""
    out: Path | None = options.out
    check_file(out, "out", ".md")
    libraries = tuple(options.library or LIBRARIES)
    for library in libraries:
        package, extra = PACKAGES[library]
        check_packages(package, extra=extra)
    wanted = [source(name).name for name in dict.fromkeys(options.model)]
    wanted = wanted or [name for each in libraries for name in names(each)]
    part = None if out is None else out.with_suffix(".part")
    rows = sorted(_measured(wanted, options.jobs, part), key=lambda row: row.model)
    text = page(rows)
    if out is None:
        print(text)
        return 0
    out.write_text(text)
    out.with_suffix(".csv").write_text(as_csv(row for row in rows if row.norms or row.why))
    if part is not None:
        part.unlink(missing_ok=True)
    print(f"{out}: {_sum_of([row for row in rows if row.norms])}")
    return 0


def measure(model: str) -> Covered:
    """Build a model, fuse it and count."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = source(model).on_meta()
        except ValueError as error:
            return Covered(model, "", 0, 0, str(error)[:120])
        package, _, family = type(module).__module__.partition(".models.")
        family = family.partition(".modeling")[0] or package
        found = report(fuse(module))
    fused, counted = found.norms_fused
    left = Counter(norm.reason for norm in found.norms if norm.counted and norm.where is None)
    # The first of the most frequent ones in the model's order.
    return Covered(model, family, counted, fused, max(left, key=left.__getitem__, default=""))


def _chunk(models: Sequence[str]) -> list[Covered]:
    torch.set_num_threads(1)
    return [measure(model) for model in models]


def _measured(models: Sequence[str], jobs: int, part: Path | None) -> Iterator[Covered]:
    """What is covered of each model; what a file has is not measured again, and what it has not is added."""
    known = {} if part is None or not part.exists() else {row.model: row for row in from_csv(part.read_text())}
    yield from (known[model] for model in models if model in known)
    rest = [model for model in models if model not in known]
    chunks = [rest[i : i + CHUNK] for i in range(0, len(rest), CHUNK)]
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for count, done in enumerate(as_completed([pool.submit(_chunk, chunk) for chunk in chunks]), 1):
            rows = done.result()
            if part is not None:
                with part.open("a") as file:
                    file.write(as_csv(rows, titled=file.tell() == 0))
            yield from rows
            seconds = time.monotonic() - began
            print(f"{count} of {len(chunks)} parts after {seconds:.0f} s: {rows[-1].model}", file=sys.stderr)


def as_csv(rows: Iterable[Covered], *, titled: bool = True) -> str:
    """A line for each model."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if titled:
        writer.writerow(field.name for field in fields(Covered))
    writer.writerows(map(astuple, rows))
    return text.getvalue()


def from_csv(text: str) -> list[Covered]:
    """The rows that `as_csv` wrote."""
    lines = csv.DictReader(io.StringIO(text))
    return [Covered(one["model"], one["family"], int(one["norms"]), int(one["fused"]), one["why"]) for one in lines]


def page(rows: Sequence[Covered]) -> str:
    """The page of coverage, in Markdown: the same for the same figures."""
    counted = [row for row in rows if row.norms]
    libraries = [library for library in LIBRARIES if any(row.model.startswith(f"{library}.") for row in counted)]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *(PACKAGES[each][0] for each in LIBRARIES)))
    lines = [
        "# What is fused of other libraries' models",
        "",
        "Made by `make coverage` (`fusedres/commands/coverage.py`) with",
        f"{versions}.",
        "Counted are all models that have a batch norm of images, in training mode and as they are built; the file",
        "coverage.csv beside this page has a line for each.",
        "",
        _sum_of(counted),
        "",
        "| library | models | anything fused | 90 % of batch norms | batch norms | fused |",
        "|---|---|---|---|---|---|",
        *(_of_library(name, [row for row in counted if row.model.startswith(f"{name}.")]) for name in libraries),
        _of_library("all", counted),
        "",
        "## By family",
        "",
        "A family is a module of the library. The worst model is that with the smallest part of its batch norms in",
        "fused passes; the reason is the most frequent one of those that are in none.",
        "",
        "| family | models | anything fused | 90 % | batch norms fused | worst model | why not the rest |",
        "|---|---|---|---|---|---|---|",
        *_families(counted),
    ]
    failed = [row for row in rows if not row.norms and row.why]
    if failed:
        lines += ["", "## Not built", "", *(f"- {row.why}" for row in failed)]
    return "\n".join(lines) + "\n"


def _sum_of(rows: Sequence[Covered]) -> str:
    anything, mostly = sum(row.fused > 0 for row in rows), sum(row.mostly for row in rows)
    return f"Of {len(rows)} models, {anything} have anything fused, and {mostly} have 90 % of their batch norms fused."


def _of_library(name: str, rows: Sequence[Covered]) -> str:
    anything, mostly = sum(row.fused > 0 for row in rows), sum(row.mostly for row in rows)
    norms, fused = sum(row.norms for row in rows), sum(row.fused for row in rows)
    return f"| {name} | {len(rows)} | {anything} | {mostly} | {norms} | {fused} ({_percent(fused, norms)}) |"


def _families(rows: Sequence[Covered]) -> Iterator[str]:
    families: dict[str, list[Covered]] = {}
    for row in rows:
        families.setdefault(f"{row.model.partition('.')[0]} {row.family}", []).append(row)
    for name, members in sorted(families.items()):
        anything, mostly = sum(row.fused > 0 for row in members), sum(row.mostly for row in members)
        norms, fused = sum(row.norms for row in members), sum(row.fused for row in members)
        worst = min(members, key=lambda row: (row.fused / row.norms, row.model))
        named = "" if worst.fused == worst.norms else f"{worst.model.partition('.')[2]} {worst.fused} of {worst.norms}"
        why = Counter(row.why for row in members if row.why)
        reason = max(why, key=why.__getitem__, default="").replace("|", "\\|")
        yield (
            f"| {name} | {len(members)} | {anything} | {mostly} | {fused} of {norms} ({_percent(fused, norms)}) "
            f"| {named} | {reason} |"
        )


def _percent(part: int, whole: int) -> str:
    # Rounded down: all is fused only where all is.
    return f"{100 * part // whole} %" if whole else "-"
