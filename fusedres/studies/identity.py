"""Scaled shortcuts: He et al. 2016, arXiv:1603.05027, equations 7 and 8.

With x' = λx + F(x) in place of x + F(x), what a block is given takes part in the output of the L-th block after it
times λ^L, and the gradient likewise on its way back; only what goes through the residuals is left. Both are measured
in the first stage of a network at its initial values, with digits or CIFAR's images: with the residuals as they are,
and with residuals of 0, which leaves the shortcuts alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from fusedres.models import variant_resnet
from fusedres.studies.pictures import lines
from fusedres.studies.study import Finding, Lab, Row, Setting, Study, Table, decided
from fusedres.studies.training import Images, Spec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["IDENTITY"]

SCALES = (1.0, 0.9, 0.7, 0.5)
KINDS = ("shortcuts alone", "whole")
DEPTH = 110
"""The paper's; its first stage has 18 blocks."""
IMAGES = 64


def _networks(setting: Setting) -> Sequence[Spec]:
    return []


def norms(model: nn.Module, images: Images) -> tuple[list[float], list[float]]:
    """Of the signals before, between and after the blocks of the first stage, and of the loss's gradients there."""
    model.train()
    signals: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        signals.extend(inputs if not signals else ())
        signals.append(output)

    stage: nn.Sequential = model.layer1  # type: ignore[assignment]
    hooks = [block.register_forward_hook(keep) for block in stage]
    loss = F.cross_entropy(model(images.pixels), images.labels)
    for hook in hooks:
        hook.remove()
    gradients = torch.autograd.grad(loss, signals)
    signal_norms, gradient_norms = (
        [float(one.detach().double().norm()) for one in tensors] for tensors in (signals, gradients)
    )
    return signal_norms, gradient_norms


def _measure(lab: Lab) -> Iterable[Row]:
    train, _ = lab.images
    images = Images(train.pixels[:IMAGES], train.labels[:IMAGES])
    for kind in KINDS:
        for scale in SCALES:
            torch.manual_seed(lab.seed)
            model = variant_resnet(
                DEPTH, "constant_scaling_shortcut", shortcut_scale=scale, residual_scale=float(kind == "whole"),
                in_channels=images.pixels.shape[1], fused=False,
            )  # fmt: skip
            signals, gradients = norms(model, images)
            for i, (signal, gradient) in enumerate(zip(signals, reversed(gradients), strict=True)):
                yield Row(_series("signal", scale, kind), i, signal / signals[0])
                yield Row(_series("gradient", scale, kind), i, gradient / gradients[-1])


def _series(what: str, scale: float, kind: str) -> str:
    return f"{what}, λ = {scale:g}, {kind}"


def rate(table: Table, what: str, scale: float, kind: str) -> float:
    """By which factor a block multiplies, from the last point."""
    last = table.last(_series(what, scale, kind))
    return math.exp(math.log(last.mean) / last.x)


def _found(table: Table) -> Finding:
    smallest = min(SCALES)
    errors = [abs(rate(table, what, s, KINDS[0]) - s) / s for what in ("signal", "gradient") for s in SCALES]
    spread = max(point.std / point.mean for point in table.points if point.series.endswith(KINDS[0]))
    forward, back = (table.last(_series(what, smallest, KINDS[0])) for what in ("signal", "gradient"))
    whole = [rate(table, "gradient", s, "whole") for s in SCALES]
    verdict = decided(max(errors) < 0.01, max(errors) > max(spread, 0.01))
    return Finding(
        f"through {int(forward.x)} shortcuts of λ = {smallest:g} come {forward.mean:.1e} of a signal and"
        f" {back.mean:.1e} of a gradient (λ^{int(forward.x)} = {smallest**forward.x:.1e}), a factor within"
        f" {max(errors):.1e} of λ a block for {', '.join(f'{s:g}' for s in SCALES)}; with residuals, a block multiplies"
        f" the gradient by {', '.join(f'{one:.2f}' for one in whole)}",
        verdict,
    )


def _draw(figure: Figure, table: Table) -> None:
    figure.set_size_inches(11, 8)
    panels = figure.subplots(2, 2, sharex=True)
    for row, kind in zip(panels, KINDS, strict=True):
        for axes, what, xlabel in zip(
            row,
            ("signal", "gradient"),
            ("blocks passed, from the first", "blocks passed, back from the last"),
            strict=True,
        ):
            axes.set_yscale("log")
            for i, scale in enumerate(SCALES):
                series = _series(what, scale, kind)
                lines(axes, table, {series: f"λ = {scale:g}"}, marker="o", markersize=4, linestyle="", color=f"C{i}")
                x = [point.x for point in table.of(series)]
                axes.plot(x, [scale**L for L in x], linewidth=1, color=f"C{i}")
            axes.set(xlabel=xlabel, ylabel=f"norm of the {what}, relative", title=f"{what}, {kind}")
    figure.suptitle(
        "scaled shortcuts at initial values: measured (points) and λ^L (lines) (He et al. 2016, equation 8)"
    )


IDENTITY = Study(
    "identity", "He et al. 2016, arXiv:1603.05027, equations 7 and 8",
    "shortcuts scaled by λ multiply signal and gradient by λ^L over L blocks: they vanish unless λ is 1",
    _networks, _measure, _found, _draw,
)  # fmt: skip
