"""Rows as pictures: speed-ups over eager, points under the roof, memory."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fusedres.bench.contenders import CONTENDERS, YARDSTICK
from fusedres.bench.rows import OK, Row

__all__ = ["PICTURES", "png", "write"]

# One colour for a contender in every picture: greys for eager, blues and greens for others, warm ones for ours.
COLORS = dict(
    zip(
        CONTENDERS,
        ("#b8b8b8", "#7a7a7a", "#6baed6", "#2171b5", "#525252", "#41ab5d", "#9e9ac8", "#e6550d", "#d94801", "#fdd0a2",
         "#fdae6b", "#fd8d3c", "#f16913", "#7f2704", "#a63603"),
        strict=True,
    )
)  # fmt: skip
MOST_ROWS = 200
MARKERS = {"op": "o", "block": "s", "network": "^"}


def _grouped(rows: Sequence[Row], value: Callable[[Row], float | None]) -> dict[str, list[tuple[Row, float]]]:
    """Rows that have a value, by comparison, in order."""
    groups: dict[str, list[tuple[Row, float]]] = {}
    for row in rows:
        number = value(row)
        if row.status == OK and number is not None:
            groups.setdefault(row.group, []).append((row, number))
    return groups


def _empty(axes: Axes, words: str) -> None:
    axes.text(0.5, 0.5, words, ha="center", va="center", wrap=True, transform=axes.transAxes)
    axes.set(xticks=[], yticks=[])


def _bars(axes: Axes, groups: dict[str, list[tuple[Row, float]]], form: str) -> None:
    """Horizontal, a block for each comparison, the first on top."""
    place, ticks = 0.0, []
    seen: dict[str, None] = {}
    for name, group in groups.items():
        first = place
        for row, number in group:
            label = None if row.contender in seen else row.contender
            seen[row.contender] = None
            axes.barh(place, number, height=0.9, color=COLORS[row.contender], label=label)
            axes.annotate(
                form.format(number), (number, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7
            )
            place += 1
        ticks.append(((first + place - 1) / 2, name))
        place += 0.8
    axes.set_yticks([tick for tick, _ in ticks], [name.replace(", ", "\n", 1) for _, name in ticks], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=4, frameon=False)


def _speeds(rows: Sequence[Row]) -> dict[str, list[tuple[Row, float]]]:
    return _grouped([row for row in rows if row.contender != YARDSTICK], lambda row: row.speedup)


def _points(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.status == OK and row.gb_per_s and row.tflop_per_s]


def _peaks(rows: Sequence[Row]) -> dict[str, list[tuple[Row, float]]]:
    return _grouped(rows, lambda row: None if row.peak_bytes is None else row.peak_bytes / row.batch / 1e6)


def _kept(rows: Sequence[Row]) -> dict[str, list[tuple[Row, float]]]:
    return _grouped(
        [row for row in rows if row.mode == "train"],
        lambda row: None if row.saved_bytes_per_image is None else row.saved_bytes_per_image / 1e6,
    )


def speedups(axes: Axes, rows: Sequence[Row]) -> None:
    """Bars: how many times eager's speed."""
    axes.set_title("Speed, times eager channels_last")
    _bars(axes, _speeds(rows), "{:.2f}")
    axes.axvline(1.0, color="black", linewidth=0.8)


def roofline(axes: Axes, rows: Sequence[Row]) -> None:
    """Points: achieved FLOP/s over FLOP per byte, under what this machine copies and multiplies at best."""
    axes.set_title("Roofline: declared bytes and FLOPs over measured time")
    points = _points(rows)
    intensities = [1e3 * (row.tflop_per_s or 0) / (row.gb_per_s or 1) for row in points]
    seen = set()
    for row, intensity in zip(points, intensities, strict=True):
        label = None if row.contender in seen else row.contender
        seen.add(row.contender)
        axes.scatter(
            intensity, row.tflop_per_s or 0, s=22, color=COLORS[row.contender], marker=MARKERS[row.kind], label=label,
            edgecolors="black", linewidths=0.3,
        )  # fmt: skip
    roofs = {row.dtype: row for row in points if row.peak_gb_per_s and row.peak_tflop_per_s}
    low, high = min(intensities) / 2, max(intensities) * 2
    for dtype, row in roofs.items():
        bandwidth, peak = (row.peak_gb_per_s or 0) / 1e3, row.peak_tflop_per_s or 0
        ridge = peak / bandwidth
        xs = sorted({low, high, min(max(ridge, low), high)})
        axes.plot(xs, [min(x * bandwidth, peak) for x in xs], color="black", linewidth=0.8)
        axes.annotate(
            f"{dtype}: {1e3 * bandwidth:.0f} GB/s, {peak:.3g} TFLOP/s", (high, min(high * bandwidth, peak)),
            xytext=(0, 3), textcoords="offset points", ha="right", fontsize=7,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def memory(axes: Axes, rows: Sequence[Row]) -> None:
    """Bars: the peak on a GPU, else what autograd saves for backward."""
    peaks = _peaks(rows)
    axes.set_title("Peak memory of a step, MB per image" if peaks else "Saved for backward, MB per image")
    _bars(axes, peaks or _kept(rows), "{:.3g}")


PICTURES: dict[str, Callable[[Axes, Sequence[Row]], None]] = {
    "speed-ups": speedups,
    "roofline": roofline,
    "memory": memory,
}


def worth(rows: Sequence[Row]) -> list[str]:
    """Those of `PICTURES` that have something to show of these rows; of the others there are none."""
    shown = _pictured(rows)
    found = {"speed-ups": _speeds(shown), "roofline": _points(shown), "memory": _peaks(shown) or _kept(shown)}
    return [name for name in PICTURES if found[name]]


def predicted_against_measured(points: Sequence[tuple[float, float, int, str]]) -> bytes:
    """A PNG of (predicted, measured, count, what it is bound by), microseconds, and the line where both are equal."""
    figure = Figure(figsize=(8.0, 6.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title("Launches of a step: measured over predicted time")
    if not points:
        _empty(axes, "no launch was measured")
        return _saved(figure)
    for i, bound in enumerate(dict.fromkeys(point[3] for point in points)):
        own = [point for point in points if point[3] == bound]
        predicted, measured, counts, _ = zip(*own, strict=True)
        sizes = [12 + 6 * count for count in counts]
        axes.scatter(
            predicted, measured, s=sizes, color=f"C{i}", alpha=0.7, edgecolors="black", linewidths=0.3,
            label=f"bound by {bound}",
        )  # fmt: skip
    low = min(min(point[:2]) for point in points) / 1.5
    high = max(max(point[:2]) for point in points) * 1.5
    axes.plot((low, high), (low, high), color="black", linewidth=0.8, label="equal")
    axes.plot((low, high), (2 * low, 2 * high), color="black", linewidth=0.5, linestyle=":", label="a factor of two")
    axes.plot((low, high), (low / 2, high / 2), color="black", linewidth=0.5, linestyle=":")
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.set(xlabel="predicted, us", ylabel="measured, us")
    axes.set_aspect("equal")
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return _saved(figure)


def _pictured(rows: Sequence[Row]) -> Sequence[Row]:
    """As many as a picture has room for, of networks if there are too many."""
    if len(rows) > MOST_ROWS:
        rows = [row for row in rows if row.kind == "network"] or rows
    return rows[:MOST_ROWS]


def _titled(axes: Axes, pictured: Sequence[Row], rows: Sequence[Row]) -> None:
    """Say in the title how many rows are left out."""
    if len(pictured) < len(rows):
        axes.set_title(f"{axes.get_title()}\n({len(pictured)} of {len(rows)} rows)")


def _height(rows: Sequence[Row]) -> float:
    """Inches, for as many bars as there are."""
    return max(4.0, 1.5 + 0.17 * len(rows))


def _saved(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def png(picture: str, rows: Sequence[Row]) -> bytes:
    """One of `PICTURES` that is `worth` it."""
    shown = _pictured(rows)
    figure = Figure(figsize=(8.0, 6.0 if picture == "roofline" else _height(shown)), layout="constrained")
    axes = figure.subplots()
    PICTURES[picture](axes, shown)
    _titled(axes, shown, rows)
    return _saved(figure)


def write(path: Path, rows: Sequence[Row]) -> bool:
    """All that are `worth` it side by side in one PNG; whether there is any."""
    shown, names = _pictured(rows), worth(rows)
    if not names:
        return False
    figure = Figure(figsize=(7.0 * len(names), _height(shown)), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        PICTURES[name](axes, shown)
        _titled(axes, shown, rows)
    path.write_bytes(_saved(figure))
    return True
