"""Probabilities of several networks averaged: He et al. 2015, arXiv:1512.03385, section 4.1 and table 5."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from fusedres.studies.pictures import bars
from fusedres.studies.study import Finding, Lab, Row, Setting, Study, Table
from fusedres.studies.training import Spec, logits_of, named

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ENSEMBLE"]

TOGETHER, GAIN = "ensemble", "error that the ensemble spares its members"


def _networks(setting: Setting) -> Sequence[Spec]:
    """Six as in the paper, of three depths, twice each."""
    depths = (32, 56, 110) if setting.full else (20, 32, 44)
    specs = [named(f"ResNet-{depth}", f"cifar_resnet{depth}") for depth in depths]
    return [*specs, *(spec._replace(label=f"{spec.label}, again", draw=1) for spec in specs)]


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
    gain = wrong.double().mean(0) - together.double()
    generator = lab.generator()
    for _ in range(lab.setting.draws):
        drawn = torch.randint(len(gain), (len(gain),), generator=generator)
        yield Row(GAIN, 0, float(gain[drawn].mean()))


def _found(table: Table) -> Finding:
    members = [table.at(series, 0) for series in table.series if series not in (TOGETHER, GAIN)]
    together, gain = table.at(TOGETHER, 0), table.at(GAIN, 0)
    best = min(member.mean for member in members)
    if abs(gain.mean) <= gain.std:
        verdict = "not decided"
    else:
        verdict = "agrees" if gain.mean > 0 and together.mean <= best else "disagrees"
    return Finding(
        f"test error {together.mean:.2%} of {len(members)} networks together,"
        f" {', '.join(f'{member.series} {member.mean:.2%}' for member in members)} alone; {100 * gain.mean:.2f} ±"
        f" {100 * gain.std:.2f} points less than theirs on average",
        verdict,  # type: ignore[arg-type]
    )


def _draw(figure: Figure, table: Table) -> None:
    figure.set_size_inches(8, 3)
    axes = figure.subplots()
    shown = [series for series in table.series if series != GAIN]
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
    _networks, _measure, _found, _draw, epochs=12,
)  # fmt: skip
