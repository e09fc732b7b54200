"""Probabilities of several networks averaged: He et al. 2015, arXiv:1512.03385, section 4.1 and table 5.

Deep networks that were trained for long err on a handful of the few test images of digits, and a difference says
nothing: here they are shallow and trained briefly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from fusedres.models import cifar_resnet
from fusedres.studies.pictures import bars
from fusedres.studies.study import Finding, Lab, Row, Setting, Study, Table, decided
from fusedres.studies.training import Spec, logits_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ENSEMBLE"]

TOGETHER = "ensemble"
GAIN, OVER_BEST = "error that the ensemble spares its members", "error that the ensemble spares the best of them"


def _networks(setting: Setting) -> Sequence[Spec]:
    """Six as in the paper, of three depths, twice each."""

    def spec(depth: int) -> Spec:
        def make(*, classes: int, channels: int, fused: bool) -> nn.Module:
            return cifar_resnet(depth, num_classes=classes, in_channels=channels, fused=fused)

        return Spec(f"ResNet-{depth}", make)

    specs = [spec(depth) for depth in ((32, 56, 110) if setting.full else (8, 14, 20))]
    return [*specs, *(one._replace(label=f"{one.label}, again", draw=1) for one in specs)]


def members_and_mean(logits: Sequence[torch.Tensor], labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which images are classified wrongly by each network (networks, N), and by the mean of probabilities (N,)."""
    stacked = torch.stack(list(logits))
    return stacked.argmax(2) != labels, stacked.softmax(2).mean(0).argmax(1) != labels


def _measure(lab: Lab) -> Iterable[Row]:
    _, test = lab.images
    wrong, together = members_and_mean([logits_of(lab.model(label), test) for label in lab.networks], test.labels)
    for label, one in zip(lab.networks, wrong, strict=True):
        yield Row(label, 0, float(one.double().mean()))
    yield Row(TOGETHER, 0, float(together.double().mean()))
    # With other test images the errors would be others: the same difference on images drawn with replacement.
    alone = {GAIN: wrong.double().mean(0), OVER_BEST: wrong[wrong.sum(1).argmin()].double()}
    generator = lab.generator()
    for _ in range(lab.setting.draws):
        drawn = torch.randint(len(together), (len(together),), generator=generator)
        for series, of in alone.items():
            yield Row(series, 0, float((of - together.double())[drawn].mean()))


def _found(table: Table) -> Finding:
    members = [table.at(series, 0) for series in table.series if series not in (TOGETHER, GAIN, OVER_BEST)]
    together, gain, over_best = (table.at(series, 0) for series in (TOGETHER, GAIN, OVER_BEST))
    # The best was chosen by the same images, which is to its advantage: being better than it is enough.
    verdict = decided(
        gain.mean > 2 * gain.std and over_best.mean > 0,
        gain.mean < -2 * gain.std or over_best.mean < -2 * over_best.std,
    )
    return Finding(
        f"test error {together.mean:.2%} of {len(members)} networks together,"
        f" {', '.join(f'{member.series} {member.mean:.2%}' for member in members)} alone; {100 * gain.mean:.2f} ±"
        f" {100 * gain.std:.2f} points less than theirs on average, {100 * over_best.mean:.2f} ±"
        f" {100 * over_best.std:.2f} less than the best",
        verdict,
    )


def _draw(figure: Figure, table: Table) -> None:
    figure.set_size_inches(8, 3)
    axes = figure.subplots()
    shown = [series for series in table.series if series not in (GAIN, OVER_BEST)]
    bars(axes, table, shown, x=0, scale=100)
    for i, series in enumerate(shown):
        point = table.at(series, 0)
        axes.annotate(f" {100 * point.mean:.2f} %", (100 * (point.mean + point.std), i), va="center")
    axes.margins(x=0.15)
    axes.set(
        xlabel="test error, %", ylabel="network", title="probabilities of several networks averaged (He et al. 2015)"
    )


ENSEMBLE = Study(
    "ensemble", "He et al. 2015, arXiv:1512.03385, tables 4 and 5",
    "six networks of different depth together err less than each alone: on ImageNet 3.57 %, the best of them 4.49 %"
    " (top 5)",
    _networks, _measure, _found, _draw, epochs=4,
)  # fmt: skip
