"""Degradation: He et al. 2015, arXiv:1512.03385, figures 1, 4 and 6."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from fusedres.studies.pictures import lines
from fusedres.studies.study import Finding, Lab, Row, Setting, Study, Table
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
    words, gaps, spreads = [], [], []
    for kind in ("plain", "ResNet"):
        shallow, *_, deep = _labels(table, kind)
        errors = [table.last(f"{label}, training") for label in (shallow, deep)]
        words.append(f"{shallow} {errors[0].mean:.1%}, {deep} {errors[1].mean:.1%}")
        gaps.append(errors[1].mean - errors[0].mean)
        spreads.append(errors[0].std + errors[1].std)
    if gaps[0] > max(spreads[0], 0.01) and gaps[1] < gaps[0] / 2:
        verdict = "agrees"
    elif gaps[0] < -spreads[0]:
        verdict = "disagrees"
    else:
        verdict = "not decided"
    return Finding(f"training error at the end: {'; '.join(words)}", verdict)  # type: ignore[arg-type]


def _draw(figure: Figure, table: Table) -> None:
    figure.set_size_inches(11, 4.5)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, kind in zip(panels, ("plain", "ResNet"), strict=True):
        for i, label in enumerate(_labels(table, kind)):
            for part, style in (("training", "--"), ("test", "-")):
                series = f"{label}, {part}"
                lines(axes, table, [series], scale=100, linestyle=style, color=f"C{i}")
        axes.set(xlabel="epoch", title="plain networks" if kind == "plain" else "residual networks")
    panels[0].set(ylabel="error, %")
    figure.suptitle("depth against error (He et al. 2015, figure 6)")


DEGRADATION = Study(
    "degradation", "He et al. 2015, arXiv:1512.03385, figures 1, 4 and 6",
    "a deeper plain network has the higher training error, a deeper residual network has not",
    _networks, _measure, _found, _draw, epochs=12,
)  # fmt: skip
