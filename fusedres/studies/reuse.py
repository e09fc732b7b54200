"""Which features the layers of a DenseNet use: Huang et al. 2017, arXiv:1608.06993, section 5 and figure 5.

Weights of all sources are alike at first, and those that are not asked for have to decay before it shows: on digits the
decay is stronger than the recipe's. How light the features of a transition become depends on it: with 0.01 they have
0.77 times the weight of the others, with 0.03 1.07 times.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fusedres.models.densenet import densenet
from fusedres.studies.study import Finding, Lab, Row, Setting, Study, Table, decided
from fusedres.studies.training import Spec
from fusedres.train.recipe import Recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["REUSE"]

BLOCKS = (1, 2, 3)
CHANCE = (0.02, 0.02, 0.1)
"""Twice the deviation of each of `ratios` at initial values; a classifier has few weights."""
DECAY = 0.01
"""Of weights, on digits."""


def _networks(setting: Setting) -> Sequence[Spec]:
    depth = 40 if setting.full else 22

    def make(*, classes: int, channels: int, fused: bool) -> nn.Module:
        return densenet(depth, num_classes=classes, in_channels=channels, fused=fused)

    def decayed(recipe: Recipe) -> Recipe:
        return recipe if setting.full else replace(recipe, weight_decay=DECAY)

    return [Spec(f"DenseNet-{depth}", make, decayed)]


def targets_of(model: nn.Module) -> Iterable[tuple[str, torch.Tensor, list[int]]]:
    """What reads the features of a block: its layers from the second on, and the transition or classifier behind it.

    Yields:
        its name, its weight (K, C) or (K, C, R, S), and the channels C by source: the block's input, then each layer.
    """
    features: Any = model.features
    for i in BLOCKS:
        widths: list[int] = []
        for number, layer in enumerate(features.get_submodule(f"denseblock{i}").children(), start=1):
            weight = layer.conv1.weight
            widths.append(weight.shape[1] - sum(widths))
            if number > 1:
                yield f"block {i}, layer {number}", weight, list(widths)
        last: Any = model.classifier if i == BLOCKS[-1] else features.get_submodule(f"transition{i}").conv
        widths.append(last.weight.shape[1] - sum(widths))
        yield f"block {i}, {'classifier' if i == BLOCKS[-1] else 'transition'}", last.weight, widths


def weights_by_source(model: nn.Module) -> Iterable[Row]:
    """By reader of a block's features: the mean absolute weight of each source over that of the heaviest source.

    x is the number of the source: 0 for what the block is given, l for its l-th layer.
    """
    for name, weight, widths in targets_of(model):
        means = [float(part.detach().double().abs().mean()) for part in weight.split(widths, dim=1)]
        for source, mean in enumerate(means):
            yield Row(name, source, mean / max(means))


def _measure(lab: Lab) -> Iterable[Row]:
    return weights_by_source(lab.model(_networks(lab.setting)[0].label))


def _columns(rows: Iterable[Row]) -> Mapping[str, Sequence[float]]:
    columns: dict[str, list[float]] = {}
    for row in rows:
        columns.setdefault(row.series, []).append(row.value)
    return columns


def ratios(rows: Iterable[Row]) -> tuple[float, float, float]:
    """Three ratios of mean weights, all 1 at initial values.

    Returns:
        that of the older half of the sources over the younger half, among readers of four sources at least; that of
        what a block is given over its layers, among layers of all blocks but the first; and that of the last third of
        the sources over the others, in the classifier.
    """
    columns = _columns(rows)
    old, given = [], []
    for name, weights in columns.items():
        half = len(weights) // 2
        if half > 1:
            old.append(fmean(weights[:half]) / fmean(weights[-half:]))
        if "layer" in name and not name.startswith("block 1"):
            given.append(weights[0] / fmean(weights[1:]))
    (classifier,) = (weights for name, weights in columns.items() if name.endswith("classifier"))
    third = len(classifier) // 3
    return fmean(old), fmean(given), fmean(classifier[-third:]) / fmean(classifier[:-third])


def _found(table: Table) -> Finding:
    seeds = list(zip(*(ratios(rows) for rows in table.rows.values()), strict=True))
    (old, given, final) = (fmean(of) for of in seeds)
    margins = [max(chance, stdev(of) if len(of) > 1 else 0.0) for chance, of in zip(CHANCE, seeds, strict=True)]
    effects = (old - 0.5, 1 - given, final - 1)
    verdict = decided(
        all(effect > margin for effect, margin in zip(effects, margins, strict=True)),
        any(effect < -margin for effect, margin in zip(effects, margins, strict=True)),
    )
    return Finding(
        f"mean weight on the older half of a layer's sources {old:.2f} times that on the younger; on what a transition"
        f" hands to blocks 2 and 3 {given:.2f} times that on their layers; in the classifier, on the last third of its"
        f" sources {final:.2f} times that on the others (1 each at initial values)",
        verdict,
    )


def _draw(figure: Figure, table: Table) -> None:
    figure.set_size_inches(13, 4.5)
    panels = figure.subplots(1, 3)
    for i, axes in zip(BLOCKS, panels, strict=True):
        names = [series for series in table.series if series.startswith(f"block {i},")]
        readers = [name.split(", ")[1].removeprefix("layer ") for name in names]
        count = len(table.of(names[-1]))
        square = [[float("nan")] * len(names) for _ in range(count)]
        for column, name in enumerate(names):
            for point in table.of(name):
                square[int(point.x)][column] = point.mean
        image = axes.imshow(square, vmin=0, vmax=1, cmap="jet")
        shown = range(len(names) - 1, -1, -max(1, len(names) // 6))
        axes.set_xticks(shown, [readers[column] for column in shown])
        axes.set(xlabel="reading layer", ylabel="source (0: the block's input)", title=f"dense block {i}")
    figure.colorbar(image, ax=panels, label="mean absolute weight, relative to the reader's largest")
    figure.suptitle("weights by source of the features (Huang et al. 2017, figure 5)")


REUSE = Study(
    "reuse", "Huang et al. 2017, arXiv:1608.06993, section 5 and figure 5",
    "layers use features of all layers before them; those that a transition hands on get the least weight, and the"
    " classifier prefers the last",
    _networks, _measure, _found, _draw, epochs=24, full_recipe="densenet",
)  # fmt: skip
