"""Kinds of shortcuts: He et al. 2015, arXiv:1512.03385, table 3."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from fusedres.studies.compared import alike, compare, ends, error_bars, in_words, labels, together
from fusedres.studies.pictures import lines
from fusedres.studies.study import Finding, Lab, Row, Setting, Study, Table
from fusedres.studies.training import Spec, named

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["OPTIONS"]

OF_PAPER = {"A, zero padding": "zero_pad", "B, projection": "projection", "C, projections": "projection_always"}


def _networks(setting: Setting) -> Sequence[Spec]:
    """Of 56 layers, the deepest that the paper trains on CIFAR without shortcuts; its table has 34 on ImageNet."""
    depth = 56 if setting.full else 32
    residual = (named(label, f"cifar_resnet{depth}", shortcut=shortcut) for label, shortcut in OF_PAPER.items())
    return [named("plain", f"cifar_plain{depth}"), *residual]


def _measure(lab: Lab) -> Iterable[Row]:
    return chain(ends(lab), lab.curves())


def _found(table: Table) -> Finding:
    plain = table.at("plain", 0)
    best, *_, worst = sorted((table.at(label, 0) for label in OF_PAPER), key=lambda point: point.mean)
    gain = plain.mean - worst.mean
    little = alike(worst.mean - best.mean, [best, worst], bound=gain / 2)
    verdict = together([compare(gain, [plain, worst]), little])
    return Finding(f"test error: {in_words(table, labels(table))}", verdict)


def _draw(figure: Figure, table: Table) -> None:
    figure.set_size_inches(11, 4)
    ending, course = figure.subplots(1, 2, width_ratios=[3, 4])
    error_bars(ending, table, labels(table))
    lines(course, table, {f"{label}, training": label for label in labels(table)}, scale=100)
    course.set(xlabel="epoch", ylabel="training error, %")
    figure.suptitle("shortcuts of option A, B and C, and none (He et al. 2015, table 3)")


OPTIONS = Study(
    "options", "He et al. 2015, arXiv:1512.03385, table 3, there on ImageNet",
    "shortcuts of each option do better than none, and the options differ by little: projections are not essential",
    _networks, _measure, _found, _draw, epochs=12,
)  # fmt: skip
