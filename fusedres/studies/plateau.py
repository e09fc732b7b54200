"""When the learning rate falls: He et al. 2015, arXiv:1512.03385, sections 3.4 and 4.2."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fusedres.studies.compared import alike, ends, in_words
from fusedres.studies.pictures import lines
from fusedres.studies.study import Finding, Lab, Row, Setting, Study, Table
from fusedres.studies.training import Spec, named
from fusedres.train.recipe import Drops, Plateau, Recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PLATEAU"]

LABELS = ("drops", "plateau")


def _drops(recipe: Recipe) -> Recipe:
    """A tenth at a half and at three quarters, as section 4.2 has it."""
    return replace(recipe, schedule=Drops((recipe.length / 2, 3 * recipe.length / 4)))


def _plateau(recipe: Recipe) -> Recipe:
    """A tenth where the training error has not fallen for so many epochs, as section 3.4 has it for ImageNet."""
    return replace(recipe, schedule=Plateau())


def _networks(setting: Setting) -> Sequence[Spec]:
    name = "cifar_resnet56" if setting.full else "cifar_resnet20"
    return [named(label, name, change=change) for label, change in zip(LABELS, (_drops, _plateau), strict=True)]


def _measure(lab: Lab) -> Iterable[Row]:
    yield from ends(lab)
    for label, network in lab.networks.items():
        yield from (Row(f"{label}, rate", row.epoch, row.lr) for row in network.history)
    yield from lab.curves()


def _found(table: Table) -> Finding:
    drops, plateau = (table.at(name, 0) for name in LABELS)
    verdict = alike(plateau.mean - drops.mean, [drops, plateau])
    rates = [[rate for _, rate in _rates(table, seed, "plateau")] for seed in table.rows]
    first, last = (" or ".join(f"{rate:.2g}" for rate in sorted({one[i] for one in rates})) for i in (0, -1))
    words = f"the plateaus bring the rate from {first} to {last}"
    return Finding(f"test error: {in_words(table, LABELS)}; {words}", verdict)


def _rates(table: Table, seed: int, label: str) -> list[tuple[float, float]]:
    """The epochs of one seed with their learning rates; a mean of seeds would be none of them."""
    return [(row.x, row.value) for row in table.rows[seed] if row.series == f"{label}, rate"]


def _draw(figure: Figure, table: Table) -> None:
    figure.set_size_inches(11, 4.5)
    errors, rates = figure.subplots(1, 2)
    for i, label in enumerate(LABELS):
        for part, style in (("training", "--"), ("test", "-")):
            lines(errors, table, [f"{label}, {part}"], scale=100, color=f"C{i}", linestyle=style)
        for seed in table.rows:
            name = label if seed == min(table.rows) else None
            rates.plot(*zip(*_rates(table, seed, label), strict=True), label=name, color=f"C{i}", drawstyle="steps-pre")
    errors.set(xlabel="epoch", ylabel="error, %", ylim=(0, 20))
    rates.set(xlabel="epoch", ylabel="learning rate", yscale="log")
    rates.locator_params(axis="x", integer=True)
    rates.grid(alpha=0.3)
    rates.legend(fontsize="small")
    figure.suptitle("the rate falls at fixed times, or where the error does not (He et al. 2015, sections 3.4, 4.2)")


PLATEAU = Study(
    "plateau", "He et al. 2015, arXiv:1512.03385, sections 3.4 and 4.2, which do not compare the two",
    "the rate is divided by 10 when the error plateaus (ImageNet) or at fixed iterations (CIFAR-10): either serves",
    _networks, _measure, _found, _draw, epochs=40,
)  # fmt: skip
