"""Lines and bars of a study's table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fusedres.studies.study import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["bars", "lines"]


def lines(
    axes: Axes, table: Table, series: Sequence[str] | Mapping[str, str], *, scale: float = 1.0, **style: Any
) -> None:
    """Each series as a line with a band of one deviation, under its name or the one it is mapped to.

    On a logarithmic axis the band reaches as far below the line as above it, since a deviation can exceed the mean.

    Args:
        axes: to draw on; its labels are the caller's.
        table: holds the series; those it does not hold are left out.
        series: names, with labels if they are mapped to some.
        scale: of the values: 100 for per cent.
        style: of the lines.
    """
    for name in series:
        points = table.of(name)
        if not points:
            continue
        x, mean, std = [p.x for p in points], [scale * p.mean for p in points], [scale * p.std for p in points]
        label = series[name] if isinstance(series, Mapping) else name
        (line,) = axes.plot(x, mean, label=label, **{"linewidth": 1, **style})
        if any(std):
            low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
            if axes.get_yscale() == "log":
                low = [m * m / h for m, h in zip(mean, high, strict=True)]
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        if axes.get_xscale() == "linear" and all(float(value).is_integer() for value in x):
            # Epochs and blocks have no halves.
            axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def bars(axes: Axes, table: Table, series: Sequence[str], *, x: float | None = None, scale: float = 1.0) -> None:
    """The value of each series at ``x``, or at its last x, as a bar with one deviation either way."""
    points = [table.last(name) if x is None else table.at(name, x) for name in series]
    axes.barh(list(series), [scale * p.mean for p in points], xerr=[scale * p.std for p in points], height=0.6)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
