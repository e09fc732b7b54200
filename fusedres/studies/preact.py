"""How fast deep networks learn: He et al. 2016, arXiv:1603.05027, figures 1 and 6 and table 3."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fusedres.models.variants import variant_resnet
from fusedres.studies.compared import CHANCE, built, compare, in_words, labels
from fusedres.studies.pictures import lines
from fusedres.studies.study import Finding, Lab, Row, Setting, Study, Table
from fusedres.studies.training import Spec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PREACT"]

KINDS = {"original": "original", "pre-activation": "full_preactivation"}
MARGIN = 0.05
"""Nats of training loss that decide nothing."""


def _networks(setting: Setting) -> Sequence[Spec]:
    """The papers have basic blocks up to 110 layers, bottlenecks with projections beyond."""
    specs = []
    for depth in (110, 164, 1001) if setting.full else (20, 110):
        deep: dict[str, Any] = {"bottleneck": True, "shortcut": "projection"} if depth > 110 else {}
        specs += [built(f"{kind}, {depth}", variant_resnet, depth, name, **deep) for kind, name in KINDS.items()]
    return specs


def _measure(lab: Lab) -> Iterable[Row]:
    """Per network the mean training loss over the first half of the epochs, then the loss of each, and the errors."""
    half = max(1, -(-max(len(network.history) for network in lab.networks.values()) // 2))
    for label, network in lab.networks.items():
        losses = [row.train_loss for row in network.history]
        # One that diverged is at chance from there on.
        early = losses[:half] + [-math.log(1 - CHANCE)] * (half - len(losses))
        yield Row(label, 0, sum(early) / half)
        yield from (Row(f"{label}, loss", i, loss) for i, loss in enumerate(losses, 1))
    yield from lab.curves()


def _found(table: Table) -> Finding:
    names = labels(table)
    # The deepest pair decides: the paper sees little of it in shallow ones.
    original, other = (table.at(name, 0) for name in names[-2:])
    words = in_words(table, names, "{:.2f}".format)
    verdict = compare(original.mean - other.mean, [original, other], MARGIN)
    return Finding(f"mean training loss over the first half of the epochs: {words}", verdict)


def _draw(figure: Figure, table: Table) -> None:
    figure.set_size_inches(11, 4.5)
    losses, errors = figure.subplots(1, 2)
    for i, name in enumerate(labels(table)):
        style: dict[str, Any] = {"color": f"C{i // 2}", "linestyle": "--" if name.startswith("original") else "-"}
        lines(losses, table, {f"{name}, loss": name}, **style)
        lines(errors, table, {f"{name}, test": name}, scale=100, **style)
    losses.set(xlabel="epoch", ylabel="training loss")
    errors.set(xlabel="epoch", ylabel="test error, %")
    figure.suptitle("original and pre-activation blocks by depth (He et al. 2016, figure 1)")


PREACT = Study(
    "preact", "He et al. 2016, arXiv:1603.05027, figures 1 and 6 and table 3",
    "the deeper the network, the faster pre-activation blocks lower the training loss, compared with the original",
    _networks, _measure, _found, _draw, epochs=10, full_recipe="he2016-preact",
)  # fmt: skip
