"""Blocks deleted from a trained network: Veit et al. 2016, arXiv:1605.06431, figures 3 and 5a."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import quantiles
from typing import TYPE_CHECKING

import torch
from torch import nn

from fusedres.studies.dissect import Part, blocks_of, dissected, residual_network
from fusedres.studies.pictures import lines
from fusedres.studies.study import Finding, Lab, Row, Setting, Study, Table, decided
from fusedres.studies.training import Images, Spec, error_of, named

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LESION"]

BLOCK, LAYER, SOME = "a residual block deleted", "a plain layer deleted", "random residual blocks deleted"
RESIDUAL, PLAIN = "whole residual network", "whole plain network"
PLAIN_NETWORK = named("plain-20", "cifar_plain20")
"""The paper's has 15 layers."""


def _networks(setting: Setting) -> Sequence[Spec]:
    return [residual_network(setting), PLAIN_NETWORK]


def delete_each(model: nn.Module, images: Images, series: str, parts: Sequence[Part]) -> Iterable[Row]:
    """The error of a dissected network with one block of one of these parts."""
    cases = [(block, part) for block in blocks_of(model) for part in parts]
    for i, (block, part) in enumerate(cases):
        block.part = part
        yield Row(series, i + 1, error_of(model, images))
        block.part = "whole"


def delete_some(
    model: nn.Module, images: Images, counts: Iterable[int], draws: int, generator: torch.Generator
) -> Iterable[Row]:
    """The error of a dissected network without so many random blocks."""
    blocks = blocks_of(model)
    for count in counts:
        for _ in range(draws):
            gone = [blocks[i] for i in torch.randperm(len(blocks), generator=generator)[:count].tolist()]
            for block in gone:
                block.part = "shortcut"
            yield Row(SOME, count, error_of(model, images))
            for block in gone:
                block.part = "whole"


def _measure(lab: Lab) -> Iterable[Row]:
    residual, plain = (dissected(lab.model(spec.label)) for spec in _networks(lab.setting))
    _, test = lab.images
    yield Row(RESIDUAL, 0, error_of(residual, test))
    yield from delete_each(residual, test, BLOCK, ["shortcut"])
    yield Row(PLAIN, 0, error_of(plain, test))
    yield from delete_each(plain, test, LAYER, ["without layer 1", "without layer 2"])
    count = len(blocks_of(residual))
    yield from delete_some(residual, test, range(0, count + 1, count // 9), lab.setting.draws, lab.generator())


def _found(table: Table) -> Finding:
    words, rises = [], []
    for whole, series in ((RESIDUAL, BLOCK), (PLAIN, LAYER)):
        error = table.at(whole, 0).mean
        errors = [point.mean for point in table.of(series)]
        low, median, high = quantiles(errors, n=4)
        rises.append((low - error, high - error))
        words.append(f"{whole} {error:.1%}, {series} {median:.1%} (median), {max(errors):.1%} (worst)")
    residual, plain = rises
    verdict = decided(residual[1] < plain[0], plain[1] < residual[0])
    return Finding(f"test error: {'; '.join(words)}", verdict)


def _draw(figure: Figure, table: Table) -> None:
    figure.set_size_inches(11, 4.5)
    one, some = figure.subplots(1, 2)
    for i, (whole, series) in enumerate(((RESIDUAL, BLOCK), (PLAIN, LAYER))):
        lines(one, table, [series], scale=100, marker=".", color=f"C{i}")
        error = 100 * table.at(whole, 0).mean
        one.axhline(error, linestyle=":", color=f"C{i}", label=f"{whole}: {error:.1f} %")
    one.legend(fontsize="small")
    one.set(xlabel="block or layer deleted, from the input", ylabel="test error, %", title="one deleted (figure 3)")
    lines(some, table, [SOME], scale=100, marker=".")
    some.set_ylim(bottom=0)
    some.set(xlabel="residual blocks deleted", ylabel="test error, %", title="random ones deleted (figure 5a)")
    figure.suptitle("parts of a trained network deleted (Veit et al. 2016)")


LESION = Study(
    "lesion", "Veit et al. 2016, arXiv:1605.06431, figures 3 and 5a",
    "a residual network hardly needs any single one of its blocks, a plain one needs each of its layers",
    _networks, _measure, _found, _draw, epochs=12,
)  # fmt: skip
