"""Blocks of a stage as steps of one estimation: Greff et al. 2017, arXiv:1612.07771; Veit et al. 2016, section 4.1."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from fusedres.studies.dissect import DissectedBlock, dissected, residual_network, stages_of
from fusedres.studies.pictures import lines
from fusedres.studies.study import Finding, Lab, Row, Setting, Study, Table, decided
from fusedres.studies.training import Images, Spec, error_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["UNROLLED"]

IMAGES = 360
STAGES = (1, 2, 3)


def _networks(setting: Setting) -> Sequence[Spec]:
    return [residual_network(setting)]


def drop_more(model: nn.Module, images: Images) -> Iterable[Row]:
    """The error of a dissected network without the last 0, 1, ... blocks of a stage, and without the first.

    The very first block of a stage stays: it changes the representation, and the others refine it.
    """
    for i, stage in zip(STAGES, stages_of(model), strict=True):
        refining = [block for block in stage if isinstance(block, DissectedBlock)][1:]
        for end, order in (("last", refining[::-1]), ("first", refining)):
            for count in range(len(order) + 1):
                for block in order[:count]:
                    block.part = "shortcut"
                yield Row(f"stage {i}, the {end} dropped", count, error_of(model, images))
            for block in order:
                block.part = "whole"


def refinement(model: nn.Module, pixels: torch.Tensor) -> Iterable[Row]:
    """By block: the norm of its residual over that of its input, and how far its output is from that of its stage.

    The latter over the norm of the stage's output. Of the first block, which changes the shape, the input is what the
    shortcut makes of it.
    """
    with torch.no_grad():
        x = model.stem(pixels.to(next(model.parameters()).device))  # type: ignore[operator]
        for i, stage in zip(STAGES, stages_of(model), strict=True):
            outputs = []
            for number, block in enumerate(stage, start=1):
                assert isinstance(block, DissectedBlock)
                inner = block.block
                yield Row(f"stage {i}, residual", number, float(inner.residual(x).norm() / inner.shortcut(x).norm()))
                x = block(x)
                outputs.append(x)
            for number, output in enumerate(outputs, start=1):
                yield Row(f"stage {i}, distance", number, float((output - x).norm() / x.norm()))


def _measure(lab: Lab) -> Iterable[Row]:
    model = dissected(lab.model(_networks(lab.setting)[0].label))
    _, test = lab.images
    yield from drop_more(model, test)
    yield from refinement(model, test.pixels[:IMAGES])


def _found(table: Table) -> Finding:
    whole = table.at("stage 1, the last dropped", 0).mean
    dropped = len(table.of("stage 1, the last dropped")) // 3
    lasts, firsts = ([table.at(f"stage {i}, the {end} dropped", dropped) for i in STAGES] for end in ("last", "first"))
    residuals = [table.of(f"stage {i}, residual") for i in STAGES]
    shrink = all(points[-1].mean < points[1].mean for points in residuals)
    # By how much the error is lower without the last blocks, in units of what tells nothing: a point of error at least.
    gaps = [
        (first.mean - last.mean) / max(first.std + last.std, 0.01) for first, last in zip(firsts, lasts, strict=True)
    ]
    verdict = decided(max(gaps) > 1 and min(gaps) > -1 and shrink, max(gaps) < -1 and not shrink)
    costs = [", ".join(f"{100 * (point.mean - whole):+.1f}" for point in points) for points in (lasts, firsts)]
    return Finding(
        f"test error {whole:.1%}; without the last {dropped} blocks of a stage {costs[0]} points, without {dropped}"
        f" near its beginning {costs[1]} (stages 1, 2, 3); residual over input from the second block of a stage to its"
        f" last {', '.join(f'{points[1].mean:.2f} to {points[-1].mean:.2f}' for points in residuals)}",
        verdict,
    )


def _draw(figure: Figure, table: Table) -> None:
    figure.set_size_inches(15, 4.5)
    dropped, residual, distance = figure.subplots(1, 3)
    for i in STAGES:
        for end, style in (("last", "-"), ("first", ":")):
            series = f"stage {i}, the {end} dropped"
            lines(dropped, table, [series], scale=100, marker=".", linestyle=style, color=f"C{i - 1}")
        lines(residual, table, {f"stage {i}, residual": f"stage {i}"}, marker=".", color=f"C{i - 1}")
        lines(distance, table, {f"stage {i}, distance": f"stage {i}"}, marker=".", color=f"C{i - 1}")
    dropped.set_ylim(0, 130)
    dropped.legend(fontsize="small", ncols=2, loc="upper left")
    dropped.set(xlabel="blocks dropped of a stage", ylabel="test error, %", title="blocks dropped")
    residual.set(xlabel="block of the stage", ylabel="norm of residual over input", title="residuals")
    distance.set(xlabel="block of the stage", ylabel="relative distance", title="distance to the stage's output")
    figure.suptitle("the blocks of a stage refine one representation (Greff et al. 2017)")


UNROLLED = Study(
    "unrolled", "Greff et al. 2017, arXiv:1612.07771, section 3; Veit et al. 2016, arXiv:1605.06431, section 4.1",
    "the blocks of a stage refine one representation by less and less: its last blocks can be dropped at little cost",
    _networks, _measure, _found, _draw, epochs=12,
)  # fmt: skip
