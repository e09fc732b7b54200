"""What came out of `make gpu`, on one page: predicted against measured times of launches first, then parts, speeds
beside published ones; all rows in one CSV, PNG and HTML."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path

from fusedres.bench import launches, page, pictures, tables
from fusedres.bench.launches import TimedLaunch, read_launches
from fusedres.bench.machine import machine
from fusedres.bench.parts import LAUNCHES, Outcome, Part
from fusedres.bench.published import PUBLISHED, beside
from fusedres.bench.rows import OK, Row, new_table, read_rows
from fusedres.bench.setting import Device

__all__ = ["compose", "write"]

SHOWN = 40


def write(out: Path, parts: Sequence[Part], outcomes: Mapping[str, Outcome], device: Device) -> None:
    """Gather the rows of all parts into bench.csv, bench.png and bench.html, and write summary.md."""
    rows, timed_launches = rows_of_parts(out, parts), launches_of(out)
    timed = [row for row in rows if row.median_s is not None]
    if rows:
        with new_table(out / "bench.csv", rows):
            pass
        page.write(out / "bench.html", timed or rows, timed_launches)
        pictures.write(out / "bench.png", timed or rows)
    summary = compose(out, parts, outcomes, rows, device, timed_launches)
    (out / "summary.md").write_text(summary, encoding="utf-8")


def launches_of(out: Path) -> list[TimedLaunch]:
    """The launches of a step that were timed, if any were."""
    path = out / f"{LAUNCHES}.csv"
    return read_launches(path) if path.exists() else []


def rows_of_parts(out: Path, parts: Sequence[Part]) -> list[Row]:
    """Every part's rows, in the order of the parts; of equal keys the first that was timed, else the first."""
    found: dict[tuple[object, ...], Row] = {}
    for part in parts:
        path = out / f"{part.name}.csv"
        for row in read_rows(path) if path.exists() and part.name != LAUNCHES else ():
            known = found.get(row.key)
            if known is None or (known.median_s is None and row.median_s is not None):
                found[row.key] = row
    return list(found.values())


def compose(
    out: Path, parts: Sequence[Part], outcomes: Mapping[str, Outcome], rows: Sequence[Row], device: Device,
    timed_launches: Sequence[TimedLaunch] = (),
) -> str:  # fmt: skip
    """The summary in Markdown."""
    here = machine(device)
    lines = [f"# {here.device}", ""]
    said = tables.caveat(device)
    lines += [f"**{said}**", ""] if said else []
    versions = (("driver", here.driver), ("torch", here.torch), ("triton", here.triton), ("CUDA", here.cuda),
                ("cuDNN", here.cudnn), ("commit", here.commit))  # fmt: skip
    lines += [", ".join(f"{name} {value}" for name, value in versions if value), ""]
    if timed_launches:
        lines += ["## Predicted against measured: the launches of a step", "", *launches.table(timed_launches, SHOWN)]
        lines += ["", f"All of them: {LAUNCHES}.csv, as a picture {LAUNCHES}.png. `fusedres calibrate {out}` fits the"]
        lines += ["model of time to them.", ""]
    lines += ["## Parts", "", "| part | | result | seconds |", "|---|---|---|---|"]
    for part in parts:
        outcome = outcomes.get(part.name)
        result = "not run yet" if outcome is None else " ".join(filter(None, (outcome.status, outcome.reason)))
        counted = _tests(out / f"{part.name}.xml")
        took = "" if outcome is None else f"{outcome.seconds:.0f}"
        lines.append(f"| {part.name} | {part.what} | {result}{f' ({counted})' if counted else ''} | {took} |")
    lines += ["", *_parity(rows), *_beside(rows), *([] if device.executed_on_cpu else _best(rows))]
    return "\n".join(lines).rstrip() + "\n"


def _tests(path: Path) -> str:
    """What a JUnit report counts."""
    try:
        suite = ElementTree.parse(path).getroot().find("testsuite")
    except (OSError, ElementTree.ParseError):
        return ""
    if suite is None:
        return ""
    number = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    bad = number["failures"] + number["errors"]
    return f"{number['tests'] - bad - number['skipped']} tests passed, {bad} failed, {number['skipped']} skipped"


def _parity(rows: Sequence[Row]) -> list[str]:
    """How many fused rows passed the gate, and which did not."""
    gated = [row for row in rows if row.ours and row.error is not None]
    if not gated:
        return []
    bad = [row for row in gated if row.status != OK]
    said = [f"- {row.group}, {row.contender}: {row.reason}" for row in gated if row.status == OK and row.reason]
    lines = [f"Of {len(gated)} comparisons of fused contenders with fp64, {len(gated) - len(bad)} passed the gate.", ""]
    said += [f"- {row.group}, {row.contender}: {row.status}: {row.reason}" for row in bad]
    return [*lines, *said, *[""] * bool(said)]


def _beside(rows: Sequence[Row]) -> list[str]:
    """ResNet-50's speed beside what others published for this GPU, or for others if it has no figures."""
    lines = ["## Published figures, ResNet-50, 224 px, images/s of one GPU", ""]
    compared = beside(rows)
    if not compared:
        lines += ["Nothing here was measured on one of these GPUs under the same conditions.", ""]
        lines += ["| GPU | mode | images/s | what | source |", "|---|---|---|---|---|"]
        lines += [
            f"| {' '.join(one.gpu)} | {one.mode}, {one.dtype} | {one.images_per_s:,.0f} | {one.what} | {one.source} |"
            for one in PUBLISHED
        ]
        return [*lines, ""]
    lines += ["| published | images/s | here | images/s | ratio |", "|---|---|---|---|---|"]
    for figure, ours in compared:
        for row in ours[:1] + [row for row in ours if row.contender == "eager"][:1]:
            speed = row.images_per_s or 0.0
            batch = f", batch {figure.batch}" if figure.batch else ""
            lines.append(
                f"| {figure.what}, {figure.mode}, {figure.dtype}{batch} ({figure.source}) "
                f"| {figure.images_per_s:,.0f} | {row.contender}, {row.dtype}, batch {row.batch} | {speed:,.0f} "
                f"| {speed / figure.images_per_s:.2f} |"
            )
    return [*lines, ""]


def _best(rows: Sequence[Row]) -> list[str]:
    """Per comparison of blocks and networks, the fastest fused contender and the fastest other."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.status == OK and row.median_s is not None:
            groups.setdefault(row.group, []).append(row)
    lines, ahead = [], 0
    for name, group in groups.items():
        ours = [row for row in group if row.ours]
        others = [row for row in group if not row.ours]
        if ours and others:
            best, rival = (min(side, key=lambda row: row.median_s or 0.0) for side in (ours, others))
            ratio = (rival.median_s or 0.0) / (best.median_s or 1.0)
            ahead += ratio >= 1
            lines.append(
                f"| {name} | {best.contender} {tables.milliseconds(best)} | {rival.contender} "
                f"{tables.milliseconds(rival)} | {ratio:.2f} |"
            )
    if not lines:
        return []
    head = ["## The fastest of ours beside the fastest of the others, ms", ""]
    head += [f"Ahead in {ahead} of {len(lines)} comparisons.", ""]
    return [*head, "| | ours | theirs | ratio |", "|---|---|---|---|", *lines, ""]
