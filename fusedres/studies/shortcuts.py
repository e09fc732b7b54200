"""What a shortcut may do to its input: He et al. 2016, arXiv:1603.05027, table 1."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from fusedres.models.variants import variant_resnet
from fusedres.studies.compared import built, compare, ends, error_bars, in_words, labels
from fusedres.studies.pictures import lines
from fusedres.studies.study import Finding, Lab, Row, Setting, Study, Table
from fusedres.studies.training import Spec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SHORTCUTS"]

FAILED = 0.2
"""A test error above it is "fail" in the paper's table."""


def _networks(setting: Setting) -> Sequence[Spec]:
    depth = 110 if setting.full else 32

    def of(label: str, variant: str, **options: float) -> Spec:
        return built(label, variant_resnet, depth, variant, **options)

    exclusive = (0, -5, -6, -7) if setting.full else (0, -6)
    return [
        of("original", "original"),
        of("scaling, 0 and 1", "constant_scaling_shortcut", shortcut_scale=0.0),
        of("scaling, 0.5 and 1", "constant_scaling_shortcut"),
        of("scaling, 0.5 and 0.5", "constant_scaling"),
        *(of(f"exclusive gating, bias {bias}", "exclusive_gating", gate_bias=bias) for bias in exclusive),
        *(of(f"shortcut-only gating, bias {bias}", "shortcut_gating", gate_bias=bias) for bias in (0, -6)),
        of("1x1 convolution", "conv_shortcut"),
        of("dropout, 0.5", "dropout_shortcut"),
    ]


def _measure(lab: Lab) -> Iterable[Row]:
    return chain(ends(lab), lab.curves())


def _found(table: Table) -> Finding:
    names = labels(table)
    original = table.at("original", 0)
    others = [table.at(name, 0) for name in names if name != "original"]
    best = min(others, key=lambda point: point.mean)
    worse = sum(compare(other.mean - original.mean, [original, other]) == "agrees" for other in others)
    failed = sum(other.mean > FAILED for other in others)
    words = f"test error: {in_words(table, ['original', best.series])}, the best of the others"
    clear = f"{worse} of {len(others)} clearly worse than the original, {failed} above {FAILED:.0%}"
    return Finding(f"{words}; {clear}", compare(best.mean - original.mean, [original, best]))


def _draw(figure: Figure, table: Table) -> None:
    figure.set_size_inches(14, 5)
    ending, course = figure.subplots(1, 2)
    names = labels(table)
    error_bars(ending, table, names)
    ending.axvline(100 * FAILED, color="grey", linestyle=":", linewidth=1, label='"fail" in the paper')
    ending.legend(fontsize="small")
    for i, name in enumerate(names):
        style: dict[str, Any] = {"color": f"C{i % 10}", "linestyle": "--" if i >= 10 else "-"}
        lines(course, table, {f"{name}, training": name}, scale=100, **style)
    # Beside the curves, which fill their panel.
    course.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    course.set(xlabel="epoch", ylabel="training error, %")
    figure.suptitle("what shortcuts do: scales and biases as in He et al. 2016, table 1")


SHORTCUTS = Study(
    "shortcuts", "He et al. 2016, arXiv:1603.05027, table 1",
    "the identity has the lowest error; scaling, gating, convolving or dropping the shortcut makes it higher",
    _networks, _measure, _found, _draw, epochs=12,
)  # fmt: skip
