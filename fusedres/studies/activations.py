"""Where activations stand: He et al. 2016, arXiv:1603.05027, table 2."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from fusedres.models.variants import variant_resnet
from fusedres.studies.compared import built, compare, ends, error_bars, in_words, labels, together
from fusedres.studies.pictures import lines
from fusedres.studies.study import Finding, Lab, Row, Setting, Study, Table
from fusedres.studies.training import Spec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ACTIVATIONS"]

ORDERS = {
    "original": "original",
    "BN after addition": "bn_after_add",
    "ReLU before addition": "relu_before_add",
    "ReLU-only pre-activation": "relu_only",
    "full pre-activation": "full_preactivation",
}
BETTER = (
    ("full pre-activation", "original"),
    ("original", "BN after addition"),
    ("original", "ReLU before addition"),
)
"""What the paper found to have the lower error, and the higher: of the orders that it tells apart by more than 0.4 %
for one of its depths. ReLU-only pre-activation is like the original."""


def _networks(setting: Setting) -> Sequence[Spec]:
    if not setting.full:
        return [built(label, variant_resnet, 32, variant) for label, variant in ORDERS.items()]
    deep: dict[str, Any] = {"bottleneck": True, "shortcut": "projection"}
    return [
        *(built(f"{label}, 110", variant_resnet, 110, variant) for label, variant in ORDERS.items()),
        *(built(f"{label}, 164", variant_resnet, 164, variant, **deep) for label, variant in ORDERS.items()),
    ]


def _measure(lab: Lab) -> Iterable[Row]:
    return chain(ends(lab), lab.curves())


def _found(table: Table) -> Finding:
    names = labels(table)
    depths = dict.fromkeys(name.partition(",")[2] for name in names)
    pairs = [
        [table.at(f"{order}{f',{depth}' if depth else ''}", 0) for order in pair] for depth in depths for pair in BETTER
    ]
    verdict = together(compare(worse.mean - better.mean, [better, worse]) for better, worse in pairs)
    return Finding(f"test error: {in_words(table, names)}", verdict)


def _draw(figure: Figure, table: Table) -> None:
    figure.set_size_inches(11, 4.5)
    ending, course = figure.subplots(1, 2)
    names = labels(table)
    error_bars(ending, table, names)
    lines(course, table, {f"{name}, training": name for name in names}, scale=100)
    course.set(xlabel="epoch", ylabel="training error, %")
    figure.suptitle("where batch norm and ReLU stand (He et al. 2016, table 2)")


ACTIVATIONS = Study(
    "activations", "He et al. 2016, arXiv:1603.05027, table 2",
    "full pre-activation has the lowest error; batch norm or ReLU between addition and shortcut makes it higher",
    _networks, _measure, _found, _draw, epochs=12, full_recipe="he2016-preact",
)  # fmt: skip
