"""Strength of layers' responses: He et al. 2015, arXiv:1512.03385, figure 7.

A batch norm begins with a scale of 1, so that all layers respond alike at first. It is the decay of the scales, against
what the loss asks for, that tells layers apart; the paper's 64,000 steps give it time, the few hundred on digits do not
unless it is stronger.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import TYPE_CHECKING

import torch
from torch import nn

from fusedres.studies.dissect import plain_copy
from fusedres.studies.pictures import lines
from fusedres.studies.study import Finding, Lab, Row, Setting, Study, Table, decided
from fusedres.studies.training import Images, Spec, logits_of, named
from fusedres.train.recipe import Recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RESPONSES"]

IMAGES = 1000
SORTED = ", sorted"
DECAY = 0.01
"""Of weights and scales, on digits."""


def _networks(setting: Setting) -> Sequence[Spec]:
    names = {
        **{f"plain-{depth}": f"cifar_plain{depth}" for depth in (20, 56)},
        **{f"ResNet-{depth}": f"cifar_resnet{depth}" for depth in ((20, 56, 110) if setting.full else (20, 56))},
    }

    def decayed(recipe: Recipe) -> Recipe:
        return recipe if setting.full else replace(recipe, weight_decay=DECAY)

    return [named(label, name, decayed) for label, name in names.items()]


def responses(model: nn.Module, images: Images) -> list[float]:
    """The standard deviation of every batch norm's output: of each 3x3 layer before ReLU and addition, in order."""
    model, deviations = plain_copy(model), []

    def keep(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        deviations.append(float(output.std()))

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(keep)
    logits_of(model, images, len(images.labels))
    return deviations


def _measure(lab: Lab) -> Iterable[Row]:
    yield from lab.curves()
    train, _ = lab.images
    images = Images(train.pixels[:IMAGES], train.labels[:IMAGES])
    for label in lab.networks:
        deviations = responses(lab.model(label), images)
        for suffix, values in (("", deviations), (SORTED, sorted(deviations, reverse=True))):
            for i, value in enumerate(values, start=1):
                yield Row(label + suffix, i, value)


def _labels(table: Table) -> list[str]:
    return [series for series in table.series if "," not in series]


def _found(table: Table) -> Finding:
    values = {label: [point.mean for point in table.of(label)] for label in _labels(table)}
    means = {label: fmean(of) for label, of in values.items()}
    # The mean over layers is known no better than their spread allows.
    errors = {label: stdev(of) / len(of) ** 0.5 for label, of in values.items()}
    pairs = [("plain-20", "ResNet-20"), ("plain-56", "ResNet-56"), ("ResNet-20", "ResNet-56")]
    effects = [(means[large] - means[small]) / (errors[large] + errors[small]) for large, small in pairs]
    verdict = decided(min(effects) > 1, min(effects) < -1)
    words = [f"{label} {mean:.2f} ± {errors[label]:.2f}{_trained(table, label)}" for label, mean in means.items()]
    return Finding(
        f"mean standard deviation of the layers' responses: {', '.join(words)}",
        verdict,
    )


def _trained(table: Table, label: str) -> str:
    """How well, in words: a network that has not learnt is no example of its kind."""
    points = table.of(f"{label}, training")
    return f" (training error {points[-1].mean:.1%})" if points else ""


def _draw(figure: Figure, table: Table) -> None:
    figure.set_size_inches(9, 7)
    original, magnitude = figure.subplots(2, 1)
    for axes, suffix, order in ((original, "", "in order"), (magnitude, SORTED, "sorted by magnitude")):
        for i, label in enumerate(_labels(table)):
            style = "--" if label.startswith("plain") else "-"
            lines(axes, table, {label + suffix: label}, linestyle=style, color=f"C{i}")
        axes.set(xlabel=f"layer, {order}", ylabel="standard deviation")
    figure.suptitle("responses of 3×3 layers after batch norm (He et al. 2015, figure 7)")


RESPONSES = Study(
    "responses", "He et al. 2015, arXiv:1512.03385, figure 7",
    "layers of residual networks respond less than those of plain ones, and less the deeper the network is",
    _networks, _measure, _found, _draw, epochs=20,
)  # fmt: skip
