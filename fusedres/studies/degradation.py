"""Degradation: He et al. 2015, arXiv:1512.03385, figures 1, 4 and 6."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from fusedres.studies.compared import MARGIN, compare, in_words, together
from fusedres.studies.pictures import lines
from fusedres.studies.study import Finding, Lab, Row, Setting, Study, Table, Verdict
from fusedres.studies.training import Spec, named

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DEGRADATION"]


def _networks(setting: Setting) -> Sequence[Spec]:
    depths = (20, 32, 44, 56) if setting.full else (20, 56)
    deepest = [named("ResNet-110", "cifar_resnet110")] if setting.full else []
    plain = [named(f"plain-{depth}", f"cifar_plain{depth}") for depth in depths]
    return [*plain, *(named(f"ResNet-{depth}", f"cifar_resnet{depth}") for depth in depths), *deepest]


def _measure(lab: Lab) -> Iterable[Row]:
    return lab.curves()


def _labels(table: Table, kind: str) -> list[str]:
    return [name.removesuffix(", training") for name in table.series if name.startswith(kind) and "training" in name]


def _found(table: Table) -> Finding:
    ends, parts = [], []
    for kind in ("plain", "ResNet"):
        shallow, *_, deep = (table.last(f"{label}, training") for label in _labels(table, kind))
        ends += [shallow.series, deep.series]
        gap = deep.mean - shallow.mean
        higher = compare(gap, [shallow, deep])
        parts.append(higher if kind == "plain" else _not(higher, gap))
    words = in_words(table, ends).replace(", training", "")
    return Finding(f"training error at the end: {words}", together(parts))


def _not(higher: Verdict, gap: float) -> Verdict:
    """Whether a gap is none; one that hides in the spread is not decided."""
    return "agrees" if gap <= MARGIN else "disagrees" if higher == "agrees" else "not decided"


def _draw(figure: Figure, table: Table) -> None:
    figure.set_size_inches(11, 4.5)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, kind in zip(panels, ("plain", "ResNet"), strict=True):
        for i, label in enumerate(_labels(table, kind)):
            for part, style in (("training", "--"), ("test", "-")):
                series = f"{label}, {part}"
                lines(axes, table, [series], scale=100, linestyle=style, color=f"C{i}")
        axes.set(xlabel="epoch", ylabel="error, %", title="plain networks" if kind == "plain" else "residual networks")
    figure.suptitle("depth against error (He et al. 2015, figure 6)")


DEGRADATION = Study(
    "degradation", "He et al. 2015, arXiv:1512.03385, figures 1, 4 and 6",
    "a deeper plain network has the higher training error, a deeper residual network has not",
    _networks, _measure, _found, _draw, epochs=12,
)  # fmt: skip
