"""What tuning found as a table for a terminal, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusedres.patterns.choose import EAGER
from fusedres.plan.schedule import SCHEDULES
from fusedres.tables import Column, Fitted

RUNGS = (EAGER.name, *SCHEDULES)


def table(title: str, blocks: Sequence[Mapping[str, Any]], *, predicted: bool = False) -> Fitted:
    """Milliseconds of a call of each kind of block by rung, what was chosen, and what a step gains by it."""

    def cell(block: Mapping[str, Any], rung: str) -> str:
        return f"{block['ms'][rung]:.3f}" if rung in block["ms"] else "out" if rung in block["left_out"] else ""

    # The rungs in the middle are the first to go.
    each = [
        Column(rung, [cell(block, rung) for block in blocks], 0 if rung in (RUNGS[0], RUNGS[-1]) else 9 - place)
        for place, rung in enumerate(RUNGS)
    ]
    gains = [f"{gained(block):.2f}" if EAGER.name in block["ms"] else "" for block in blocks]
    columns = [
        Column("block", [block["title"] for block in blocks], words=True), *each,
        Column("chosen", [block["rung"] for block in blocks], words=True), Column("gains ms", gains),
    ]  # fmt: skip
    return Fitted(f"{title}; {'predicted, not measured' if predicted else 'measured'}", columns)


def gained(block: Mapping[str, Any]) -> float:
    """Milliseconds that a step gains by what was chosen for a kind of block."""
    ms = block["ms"]
    return float((ms[EAGER.name] - ms[block["rung"]]) * block["count"]) if EAGER.name in ms else 0.0


def notes(blocks: Sequence[Mapping[str, Any]], step: Mapping[str, Any]) -> list[str]:
    """What the table does not say: rungs that were left out, choices inside, and the whole step."""
    lines = [
        f"{block['title']}: {rung} left out: {block['left_out'][rung]}"
        for block in blocks
        for rung in RUNGS
        if rung in block["left_out"] and rung not in block["ms"]
    ]
    changed = sum(not told.startswith("as it was") for block in blocks for told in block["sites"].values())
    looked = sum(len(block["sites"]) for block in blocks)
    if looked:
        lines.append(f"inside the rungs: {looked} choices looked at, {changed} changed")
    if "failed" in step:
        lines.append(f"the whole step could not be timed: {step['failed']}")
    else:
        (low, eager, high), (tuned_low, tuned, tuned_high) = step["eager_ms"], step["tuned_ms"]
        words = f"{eager:.3g} ms ({low:.3g}-{high:.3g}) eager, {tuned:.3g} ms ({tuned_low:.3g}-{tuned_high:.3g}) tuned"
        lines.append(f"the whole step: {words}, {eager / tuned:.2f} x")
    if step.get("back"):
        lines.append(f"went back to eager for the step's sake: {', '.join(step['back'])}")
    return lines


def draw(path: Path, title: str, blocks: Sequence[Mapping[str, Any]], *, predicted: bool = False) -> None:
    """Write a picture of the same as a PNG file: a group of bars for each kind of block, the chosen one framed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.6 + 0.75 * len(blocks)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(RUNGS)
    for i, rung in enumerate(RUNGS):
        places = [(place, block) for place, block in enumerate(blocks) if rung in block["ms"]]
        axes.barh(
            [place + (i - (len(RUNGS) - 1) / 2) * height for place, _ in places],
            [block["ms"][rung] for _, block in places],
            height=height,
            color="#9a9a9a" if rung == EAGER.name else f"C{i - 1}",
            label=rung,
            edgecolor=["black" if block["rung"] == rung else "none" for _, block in places],
            linewidth=1.5,
        )
    axes.set_yticks(range(len(blocks)), [block["title"] for block in blocks])
    axes.invert_yaxis()
    axes.set_xlabel(f"milliseconds of a call, {'predicted' if predicted else 'measured'}; framed: chosen")
    axes.set_title(title, fontsize="medium", loc="left", wrap=True)
    legend = figure.legend(fontsize="small", loc="outside lower center", ncols=len(RUNGS))
    for patch in legend.get_patches():
        patch.set_edgecolor("none")
    figure.savefig(path, dpi=120)
