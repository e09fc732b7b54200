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
    figure = Figure(figsize=(14, 6), layout="constrained")
    bars, roof = figure.subplots(1, 2, width_ratios=(1, 1.15))
    question = found.question
    mode = "inference" if question.infer else "training step"
    figure.suptitle(f"{question.model}, {mode}, batch {question.batch}, {question.dtype}; computed, not measured")
    _bars(bars, found)
    _roofline(roof, found)
    figure.savefig(path, dpi=120)


def _bars(axes: Axes, found: Explanation) -> None:
    bottoms = [0.0] * len(found.steps)
    totals = [bytes_by_kind(step.entries) for step in found.steps.values()]
    for kind in KINDS:
        heights = [total[kind] / found.question.batch / 1e6 for total in totals]
        if any(heights):
            axes.bar(list(found.steps), heights, bottom=bottoms, color=COLOURS[kind], label=kind)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for place, step in enumerate(found.steps.values()):
        figures = found.figures(step)
        axes.text(
            place, bottoms[place], f"{bottoms[place]:.0f} MB\n{figures.launches} launches", ha="center", va="bottom"
        )
    axes.set_ylim(0, 1.18 * max(bottoms))
    axes.set_ylabel("MB per image, read and written")
    axes.legend(fontsize="small", ncols=2)
    axes.set_title("bytes by kind of work")


def _roofline(axes: Axes, found: Explanation) -> None:
    """Every launch of eager and of the last rung: its time at the roofline over what it computes per byte."""
    gpu, rate = found.gpu, found.rate
    last = list(found.rungs)[-1]
    for name, step, marker in (("eager", found.eager, "x"), (last, found.rungs[last], "o")):
        for kind in KINDS:
            chosen = [
                entry for entry in step.entries if entry.kind == kind and entry.bytes > SMALL * found.question.batch
            ]
            if chosen:
                intensity = [max(entry.flops / entry.bytes, LEAST_INTENSITY) for entry in chosen]
                seconds = [found.seconds([entry]) * 1e3 for entry in chosen]
                label = kind if name == last else None
                axes.scatter(intensity, seconds, marker=marker, color=COLOURS[kind], alpha=0.6, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte")
    axes.set_ylabel("ms of a launch, at least")
    axes.legend(fontsize="small", loc="lower right")
    axes.set_title(f"each launch: eager as crosses, {last} as circles")
    corner = rate / gpu.bandwidth
    ceiling = axes.twinx()
    ends = [LEAST_INTENSITY, corner, 30 * corner]
    ceiling.plot(ends, [min(rate, end * gpu.bandwidth) / 1e12 for end in ends], color="grey", lw=1)
    ceiling.axvline(corner, color="grey", lw=1, ls=":")
    ceiling.set_yscale("log")
    ceiling.set_ylabel(f"line: TFLOP/s of {gpu.name} at most; left of the dots its memory is the limit")
