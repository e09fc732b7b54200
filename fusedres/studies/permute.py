"""Blocks of a trained network in another order: Veit et al. 2016, arXiv:1605.06431, figure 5b."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from fusedres.studies.dissect import blocks_of, dissected, residual_network, stages_of
from fusedres.studies.study import Finding, Lab, Row, Setting, Study, Table, decided
from fusedres.studies.training import Images, Spec, error_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PERMUTE"]

ERROR = "test error of the order"
SWAPS = [1, 2, 4, 8, 16, 32]


def _networks(setting: Setting) -> Sequence[Spec]:
    return [residual_network(setting)]


def kendall(order: Sequence[int]) -> float:
    """Kendall's rank correlation of a permutation with the original order."""
    pairs = [(a, b) for a in range(len(order)) for b in range(a)]
    return sum(math.copysign(1, order[a] - order[b]) for a, b in pairs) / len(pairs)


def shuffle_some(
    model: nn.Module, images: Images, swaps: Iterable[int], draws: int, generator: torch.Generator
) -> Iterable[Row]:
    """The error after so many random swaps of blocks of the same shape, against Kendall's τ of the order."""
    blocks = blocks_of(model)
    groups = [[blocks.index(block) for block in stage if block.keeps_shape] for stage in stages_of(model)]
    groups = [group for group in groups if len(group) > 1]
    own = [block.block for block in blocks]
    for count in swaps:
        for _ in range(draws):
            order = list(range(len(blocks)))
            for _ in range(count):
                group = groups[int(torch.randint(len(groups), (), generator=generator))]
                a, b = (group[int(i)] for i in torch.randperm(len(group), generator=generator)[:2])
                order[a], order[b] = order[b], order[a]
            for block, i in zip(blocks, order, strict=True):
                block.block = own[i]
            yield Row(ERROR, kendall(order), error_of(model, images))
    for block, module in zip(blocks, own, strict=True):
        block.block = module


def _measure(lab: Lab) -> Iterable[Row]:
    model = dissected(lab.model(_networks(lab.setting)[0].label))
    _, test = lab.images
    yield Row(ERROR, 1.0, error_of(model, test))
    yield from shuffle_some(model, test, SWAPS, lab.setting.draws, lab.generator())


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, of two lists; equal values share the mean of their ranks."""
    ranks = []
    for values in (a, b):
        tensor = torch.tensor(values, dtype=torch.float64)
        below, upto = (compare(tensor[:, None], tensor).sum(1) for compare in (torch.gt, torch.ge))
        ranks.append((below + upto) / 2)
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def _found(table: Table) -> Finding:
    rows = [row for one in table.rows.values() for row in one]
    correlation = rank_correlation([-row.x for row in rows], [row.value for row in rows])
    whole, worst = table.at(ERROR, 1.0).mean, table.of(ERROR)[0]
    # Twice the deviation of the rank correlation of as many unrelated pairs.
    chance = 2 / math.sqrt(len(rows))
    verdict = decided(correlation > chance, correlation < -chance)
    return Finding(
        f"test error {whole:.1%} in order, {worst.mean:.1%} at the largest disorder, τ = {worst.x:.2f};"
        f" rank correlation of error and disorder {correlation:.2f}",
        verdict,
    )


def _draw(figure: Figure, table: Table) -> None:
    figure.set_size_inches(7, 5)
    axes = figure.subplots()
    points = table.of(ERROR)
    axes.plot([p.x for p in points], [100 * p.mean for p in points], "o", alpha=0.6, markersize=4)
    axes.axhline(100 * table.at(ERROR, 1.0).mean, linestyle=":", color="C1", label="in order")
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set(
        xlabel="Kendall's τ of the order of the blocks", ylabel="test error, %",
        title="blocks of one shape permuted (Veit et al. 2016, figure 5b)",
    )  # fmt: skip


PERMUTE = Study(
    "permute", "Veit et al. 2016, arXiv:1605.06431, figure 5b",
    "the error of a residual network rises smoothly with the disorder of its blocks",
    _networks, _measure, _found, _draw, epochs=12,
)  # fmt: skip
