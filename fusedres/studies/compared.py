"""Networks that differ in one thing and are compared by one number each: what several studies share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

import fusedres
from fusedres.studies.pictures import bars
from fusedres.studies.study import Lab, Point, Row, Table, Verdict, decided
from fusedres.studies.training import Spec

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "CHANCE", "MARGIN", "alike", "built", "compare", "ends", "error_bars", "in_words", "labels", "together",
]  # fmt: skip

CHANCE = 0.9
"""The error of a guess: CIFAR-10 and digits have ten classes."""
MARGIN = 0.01
"""Errors that differ by less decide nothing: four of the test images of digits, a hundred of CIFAR's."""


def built(label: str, build: Callable[..., nn.Module], *args: Any, **options: Any) -> Spec:
    """The `Spec` of a network of `fusedres.models` that has no name there, by its function and arguments."""

    def make(*, classes: int, channels: int, fused: bool) -> nn.Module:
        model = build(*args, num_classes=classes, in_channels=channels, fused=fused, **options)
        return fusedres.fuse(model) if fused else model

    return Spec(label, make)


def ends(lab: Lab) -> Iterable[Row]:
    """The test error of each network after its training, as series "<label>"; one that diverged is at `CHANCE`."""
    for label, network in lab.networks.items():
        yield Row(label, 0, CHANCE if network.diverged else network.history[-1].held_out_error)


def labels(table: Table) -> list[str]:
    """Those of the networks that have one number, at 0, in the order of training; curves begin with epoch 1."""
    return [point.series for point in table.points if point.x == 0]


def in_words(table: Table, names: Iterable[str], scale: Callable[[float], str] = "{:.1%}".format) -> str:
    """The last value of each series, with its deviation where there are several, and whose it is."""
    points = [table.last(name) for name in names]
    return "; ".join(f"{scale(p.mean)}{f' ± {scale(p.std)}' if p.samples > 1 else ''} for {p.series}" for p in points)


def compare(gap: float, points: Sequence[Point], margin: float = MARGIN) -> Verdict:
    """What ``gap``, above 0 where the paper is right, decides.

    Args:
        gap: of the means of ``points``.
        points: a gap within the sum of their deviations decides nothing.
        margin: nor does one within it, which is all there is to hold one seed to.
    """
    spread = max(margin, sum(point.std for point in points))
    return decided(gap > spread, gap < -spread)


def alike(gap: float, points: Sequence[Point], bound: float = 2 * MARGIN) -> Verdict:
    """What ``gap``, within ``bound`` where the paper is right, decides; the spread of one seed counts as two margins.

    Args:
        gap: of the means of ``points``, either way.
        points: the sum of their deviations must not reach over the bound, from either side.
        bound: within which the means are alike.
    """
    spread = max(sum(point.std for point in points), 0 if all(point.samples > 1 for point in points) else 2 * MARGIN)
    return decided(abs(gap) + spread < bound, abs(gap) - spread > bound)


def together(verdicts: Iterable[Verdict]) -> Verdict:
    """Of all parts of a claim: it holds if every part does, and does not if one does not."""
    given = set(verdicts)
    return "disagrees" if "disagrees" in given else "not decided" if "not decided" in given else "agrees"


def error_bars(axes: Axes, table: Table, names: Sequence[str]) -> None:
    """The `ends` of networks as bars, in per cent, each with its value beside it."""
    bars(axes, table, names, x=0, scale=100)
    for i, point in enumerate(table.at(name, 0) for name in names):
        text = f"{100 * point.mean:.1f}"
        axes.annotate(text, (100 * (point.mean + point.std), i), (4, 0), textcoords="offset points", va="center")
    axes.margins(x=0.12)
    axes.set(xlabel="test error, %")
