"""A lower learning rate at first: He et al. 2015, arXiv:1512.03385, section 4.2."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fusedres.studies.compared import alike, compare, ends, in_words, together
from fusedres.studies.pictures import lines
from fusedres.studies.study import Finding, Lab, Row, Setting, Study, Table
from fusedres.studies.training import Spec, named
from fusedres.train.recipe import Drops, Recipe, WarmUp

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["WARMUP"]

LABELS = ("0.01 at first", "0.1 from the start")
STARTED = 0.8
"""The training error below which the paper ends the warm-up."""


def _with(recipe: Recipe) -> Recipe:
    """0.1 after the warm-up, with drops at a half and three quarters, as in the paper's own recipe."""
    drops = Drops((recipe.length / 2, 3 * recipe.length / 4))
    return replace(recipe, schedule=drops, warm_up=WarmUp(0.01, until_error=STARTED))


def _without(recipe: Recipe) -> Recipe:
    return replace(_with(recipe), warm_up=None)


def _networks(setting: Setting) -> Sequence[Spec]:
    """The paper's 110 layers do not learn digits in a few hundred steps, with a warm-up or without: on those fewer."""
    name = "cifar_resnet110" if setting.full else "cifar_resnet56"
    return [named(label, name, change=change) for label, change in zip(LABELS, (_with, _without), strict=True)]


def _measure(lab: Lab) -> Iterable[Row]:
    """Per network the test error at the end, and the epochs until training has started; one more than all if never."""
    yield from ends(lab)
    for label, network in lab.networks.items():
        started = (row.epoch for row in network.history if row.train_error < STARTED)
        yield Row(f"{label}, epochs", 0, next(started, len(network.history) + 1))
    yield from lab.curves()


def _found(table: Table) -> Finding:
    with_, without = (table.at(name, 0) for name in LABELS)
    late = [table.at(f"{name}, epochs", 0) for name in LABELS]
    verdict = together([
        compare(late[1].mean - late[0].mean, late, margin=1),
        alike(without.mean - with_.mean, [with_, without]),
    ])  # fmt: skip
    words = in_words(table, [point.series for point in late], "{:.1f}".format).replace(", epochs", "")
    return Finding(
        f"epochs until the training error is below {STARTED:.0%}: {words}; test error: {in_words(table, LABELS)}",
        verdict,
    )


def _draw(figure: Figure, table: Table) -> None:
    figure.set_size_inches(11, 4.5)
    for axes, part in zip(figure.subplots(1, 2, sharey=True), ("training", "test"), strict=True):
        for label, style in zip(LABELS, ("-", "--"), strict=True):
            lines(axes, table, {f"{label}, {part}": label}, scale=100, linestyle=style)
        axes.axhline(100 * STARTED, color="grey", linestyle=":", linewidth=1)
        axes.set(xlabel="epoch", ylabel=f"{part} error, %")
    figure.suptitle("with and without a warm-up (He et al. 2015, section 4.2)")


WARMUP = Study(
    "warmup", "He et al. 2015, arXiv:1512.03385, section 4.2",
    "with 0.1 from the start 110 layers take several epochs to start converging, and reach a similar accuracy",
    _networks, _measure, _found, _draw, epochs=20,
)  # fmt: skip
