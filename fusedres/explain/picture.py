"""An `Explanation` as a picture: bytes by kind of work per rung, and every launch under the roofline."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fusedres.explain.explanation import Explanation
from fusedres.traffic.account import KINDS, bytes_by_kind

# Bytes per image below which a launch is not drawn, and the FLOP per byte at which the drawing begins.
SMALL, LEAST_INTENSITY = 1e4, 1e-2
COLOURS = {kind: f"C{index}" for index, kind in enumerate(KINDS)}


def draw(path: Path, found: Explanation) -> None:
    """Write the picture of an explanation as a PNG file."""
    figure = Figure(figsize=(14, 6.5), layout="constrained")
    bars, launches = figure.subplots(1, 2)
    question = found.question
    mode = "inference" if question.infer else "training step"
    figure.suptitle(
        f"{question.model}, {mode}, batch {question.batch}, {question.dtype}, {found.gpu.name}; computed, not measured"
    )
    _bars(bars, found)
    _launches(launches, found)
    # One for both, since colours mean the same; below, where it covers nothing.
    figure.legend(*bars.get_legend_handles_labels(), loc="outside lower center", ncols=len(KINDS), fontsize="small")
    figure.savefig(path, dpi=120)


def _bars(axes: Axes, found: Explanation) -> None:
    places = range(len(found.steps))
    bottoms = [0.0] * len(found.steps)
    totals = [bytes_by_kind(step.entries) for step in found.steps.values()]
    for kind in KINDS:
        heights = [total[kind] / found.question.batch / 1e6 for total in totals]
        if any(heights):
            axes.bar(places, heights, bottom=bottoms, color=COLOURS[kind], label=kind)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for place in places:
        axes.text(place, bottoms[place], f"{bottoms[place]:.3g} MB", ha="center", va="bottom")
    axes.set_xticks(places, [f"{name}\n{len(step.entries)}" for name, step in found.steps.items()])
    axes.set_xlabel("rung, and launches of a step")
    axes.set_ylim(0, 1.08 * max(bottoms))
    axes.set_ylabel("MB per image, read and written")
    axes.set_title("bytes by kind of work")


def _launches(axes: Axes, found: Explanation) -> None:
    """Every launch of eager and of the last rung: its time at the roofline over what it computes per byte."""
    gpu, rate = found.gpu, found.rate
    last = list(found.rungs)[-1]
    for step, marker in ((found.eager, "x"), (found.rungs[last], "o")):
        for kind in KINDS:
            chosen = [
                entry for entry in step.entries if entry.kind == kind and entry.bytes > SMALL * found.question.batch
            ]
            intensity = [max(entry.flops / entry.bytes, LEAST_INTENSITY) for entry in chosen]
            seconds = [found.seconds([entry]) * 1e3 for entry in chosen]
            axes.scatter(intensity, seconds, marker=marker, color=COLOURS[kind], alpha=0.6)
    corner = rate / gpu.bandwidth
    axes.axvspan(LEAST_INTENSITY / 2, corner, color="black", alpha=0.05, lw=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left=LEAST_INTENSITY / 2)
    axes.set_xlabel(f"FLOP per byte, at least {LEAST_INTENSITY:g}; shaded: memory is the limit, not arithmetic")
    axes.set_ylabel("ms of a launch, at least")
    axes.set_title(f"each launch at the roofline: eager as crosses, {last} as circles")
