"""Paths through a network, their lengths and gradients: Veit et al. 2016, arXiv:1605.06431, figure 6."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from fusedres.studies.dissect import blocks_of, dissected, residual_network
from fusedres.studies.pictures import lines
from fusedres.studies.study import Finding, Lab, Row, Setting, Study, Table, decided
from fusedres.studies.training import Images, Spec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PATHS"]

PATHS_SHARE, NORM, CARRIED = "share of all paths", "gradient of one path", "share of the gradient"
IMAGES = 64


def _networks(setting: Setting) -> Sequence[Spec]:
    return [residual_network(setting)]


def path_gradients(model: nn.Module, images: Images, draws: int, generator: torch.Generator) -> Iterable[Row]:
    """Norm of the loss's gradient at the input along random paths of every length, and what all of them carry."""
    blocks = blocks_of(model)
    total = len(blocks)
    device = next(model.parameters()).device
    pixels, labels = (part.to(device) for part in images)
    shares = [math.comb(total, length) / 2**total for length in range(total + 1)]
    carried = []
    for length, share in enumerate(shares):
        norms = []
        for _ in range(draws):
            chosen = set(torch.randperm(total, generator=generator)[:length].tolist())
            for i, block in enumerate(blocks):
                block.part = "gradient by residual" if i in chosen else "gradient by shortcut"
            x = pixels.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), labels), x)
            norms.append(float(gradient.double().norm()))  # squares of long paths' gradients would underflow
            yield Row(NORM, length, norms[-1])
        yield Row(PATHS_SHARE, length, share)
        carried.append(share * sum(norms) / draws)
    for block in blocks:
        block.part = "whole"
    yield from (Row(CARRIED, length, part / sum(carried)) for length, part in enumerate(carried))


def middle(shares: Mapping[float, float], share: float = 0.9) -> tuple[int, int]:
    """The lengths between which ``share`` of a distribution over 0, 1, ... lies, the same on either side."""
    sums = torch.tensor([shares[length] for length in sorted(shares)], dtype=torch.float64).cumsum(0)
    low, high = (int((sums < bound).sum()) for bound in ((1 - share) / 2, (1 + share) / 2))
    return low, high


def _measure(lab: Lab) -> Iterable[Row]:
    model = dissected(lab.model(_networks(lab.setting)[0].label))
    train, _ = lab.images
    images = Images(train.pixels[:IMAGES], train.labels[:IMAGES])
    yield from path_gradients(model, images, lab.setting.draws, lab.generator())


def _found(table: Table) -> Finding:
    typical, carrying = (
        middle({point.x: point.mean for point in table.of(series)}) for series in (PATHS_SHARE, CARRIED)
    )
    verdict = decided(carrying[1] < typical[0], carrying[0] > typical[0])
    effective = sum(point.mean for point in table.of(PATHS_SHARE) if carrying[0] <= point.x <= carrying[1])
    return Finding(
        f"of {int(table.last(PATHS_SHARE).x)} blocks, 90 % of all paths run through {typical[0]} to {typical[1]},"
        f" 90 % of the gradient through {carrying[0]} to {carrying[1]}, where {effective:.2%} of the paths are",
        verdict,
    )


def _draw(figure: Figure, table: Table) -> None:
    figure.set_size_inches(14, 4.5)
    panels = figure.subplots(1, 3)
    panels[1].set_yscale("log")
    shown = ((PATHS_SHARE, "lengths of paths"), (NORM, "gradient by length"), (CARRIED, "both: effective paths"))
    for axes, (series, title) in zip(panels, shown, strict=True):
        lines(axes, table, [series], marker=".")
        axes.set(xlabel="length of the path, blocks", ylabel=series, title=title)
        axes.get_legend().remove()
    panels[1].set(ylabel="norm of the gradient at the input")
    figure.suptitle("paths through a residual network (Veit et al. 2016, figure 6)")


PATHS = Study(
    "paths", "Veit et al. 2016, arXiv:1605.06431, figure 6",
    "lengths of paths are binomial, but the gradient comes from the few short ones",
    _networks, _measure, _found, _draw, epochs=12,
)  # fmt: skip
