"""Shattered gradients: Balduzzi et al. 2017, arXiv:1702.08591.

Along a line through the inputs, the gradient of a deep plain network at its initial values looks like white noise, that
of a shallow one like brown noise, and that of a residual network lies between (section 2 and figure 1). The measure is
the autocorrelation of the gradient along the line.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from fusedres.studies.dissect import dissected_resnet
from fusedres.studies.training import digits

__all__ = ["Curve", "autocorrelation", "draw", "line_gradient", "network_gradient", "run", "write"]

# Of figure 1: a grid of 256 inputs, 200 units a layer.
POINTS = 256
WIDTH = 200
REACH = 2.0


class Curve(NamedTuple):
    """Autocorrelation by lag, mean and deviation over draws, and the gradient of the first draw."""

    name: str
    mean: torch.Tensor
    std: torch.Tensor
    example: torch.Tensor


def autocorrelation(gradient: torch.Tensor) -> torch.Tensor:
    """Of (D, N) gradients at N points of a line, (N/2,) by lag: Σ_d Σ_i g(i)g(i+lag) / Σ_d Σ_i g(i)², per pair."""
    centred = (gradient - gradient.mean(-1, keepdim=True)).double()
    N = centred.shape[-1]
    products = [(centred[..., : N - lag] * centred[..., lag:]).sum() / (N - lag) for lag in range(N // 2)]
    return torch.stack(products) / products[0]


def network_gradient(kind: str, depth: int, generator: torch.Generator, *, beta: float = 0.1) -> torch.Tensor:
    """df/dx (1, 256) of a fully connected network with a scalar input at its initial values (He et al. 2015).

    Args:
        kind: "plain", whose layers centre their input over the grid (batch norm without the division), or
            "residual", x + β·W·relu(bn(x)), equation 2 of the paper.
        depth: hidden layers.
        generator: of weights and of the first layer's kinks, which are spread over the grid.
        beta: scale of the residuals.
    """

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = torch.linspace(-REACH, REACH, POINTS, dtype=torch.float64)[:, None].requires_grad_()
    kinks = REACH * (2 * torch.rand(WIDTH, generator=generator, dtype=torch.float64) - 1)
    hidden = (x - kinks) * normal(WIDTH)
    if kind == "residual":
        for _ in range(depth - 1):
            weight = normal(WIDTH, WIDTH) * (2 / WIDTH) ** 0.5
            deviation, mean = torch.std_mean(hidden, 0, correction=0)
            hidden = hidden + beta * ((hidden - mean) / (deviation + 1e-5)).relu() @ weight
    else:
        for _ in range(depth - 1):
            weight = normal(WIDTH, WIDTH) * (2 / WIDTH) ** 0.5
            hidden = hidden.relu() @ weight
            hidden = hidden - hidden.mean(0)
    output = hidden.relu() @ normal(WIDTH)
    return torch.autograd.grad(output.sum(), x)[0].T


def line_gradient(model: nn.Module, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """d logit / dt (classes, 256) of ``model`` along the line from image ``start`` to image ``end``.

    Batch norm takes its statistics from the line, as in training.
    """
    model.train()
    t = torch.linspace(0, 1, POINTS).requires_grad_()
    logits = model(start + t[:, None, None, None] * (end - start))
    rows = [torch.autograd.grad(logits[:, i].sum(), t, retain_graph=True)[0] for i in range(logits.shape[1])]
    return torch.stack(rows).detach()


def _curve(name: str, gradients: Sequence[torch.Tensor]) -> Curve:
    curves = torch.stack([autocorrelation(gradient) for gradient in gradients])
    return Curve(name, curves.mean(0), curves.std(0, correction=0), gradients[0][0])


def noise(draws: int, generator: torch.Generator) -> list[Curve]:
    """White and brown noise, to compare with."""
    white = [torch.randn(1, POINTS, generator=generator, dtype=torch.float64) for _ in range(draws)]
    return [_curve("white noise", white), _curve("brown noise", [one.cumsum(1) for one in white])]


def write(path: Path, curves: Sequence[Curve]) -> None:
    """Every curve as lines of CSV."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["network", "lag", "autocorrelation", "std"])
        for curve in curves:
            for lag, (mean, std) in enumerate(zip(curve.mean.tolist(), curve.std.tolist(), strict=True)):
                writer.writerow([curve.name, lag, mean, std])


def draw(path: Path, groups: Sequence[tuple[str, Sequence[Curve]]], title: str) -> None:
    """A column per group: the gradients along the line, and their autocorrelations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(groups), 8), layout="constrained")
    panels = figure.subplots(2, len(groups), squeeze=False)
    for i_group, (name, curves) in enumerate(groups):
        examples, correlations = panels[:, i_group]
        for i, curve in enumerate(curves):
            example = curve.example / curve.example.abs().max()
            examples.plot((example - 2.2 * i).tolist(), linewidth=0.8)
            correlations.plot(curve.mean.tolist(), label=curve.name)
        examples.set(title=name, xlabel="point of the line")
        examples.set_yticks([-2.2 * i for i in range(len(curves))], [curve.name for curve in curves])
        correlations.set(xlabel="lag", ylabel="autocorrelation")
        correlations.grid(alpha=0.3)
        correlations.legend()
    figure.suptitle(title)
    figure.savefig(path, format="png", dpi=120)


def run(name: str, folder: Path, *, seed: int, draws: int, say: Callable[[str], None]) -> None:
    """Both settings, the paper's and this library's networks between digits: shattered.csv and .png.

    Args:
        name: a network of basic blocks, such as cifar_resnet56; its plain counterpart has no shortcuts.
        folder: exists.
        seed: of weights and of the choice of digits.
        draws: networks per curve.
        say: takes lines for people.

    Raises:
        ValueError: the network is no such one, before anything is computed.
    """
    with torch.device("meta"):
        dissected_resnet(name)
    generator = torch.Generator().manual_seed(seed)
    paper = [
        _curve(label, [network_gradient(kind, depth, generator) for _ in range(draws)])
        for label, kind, depth in (
            ("plain, 1 layer", "plain", 1), ("plain, 24 layers", "plain", 24), ("residual, 50 layers", "residual", 50),
        )
    ]  # fmt: skip
    train, _ = digits()
    ours = []
    torch.manual_seed(seed)
    for label, part in ((f"{name}", "whole"), (f"{name} without shortcuts", "residual")):
        gradients = []
        for _ in range(draws):
            start, end = train.pixels[torch.randperm(len(train.pixels), generator=generator)[:2]]
            gradients.append(line_gradient(dissected_resnet(name, part=part), start, end))  # type: ignore[arg-type]
        ours.append(_curve(label, gradients))
    curves = [*paper, *ours, *noise(draws, generator)]
    for curve in curves:
        say(f"{curve.name}: autocorrelation {curve.mean[1]:.2f} at lag 1, {curve.mean[10]:.2f} at lag 10")
    write(folder / "shattered.csv", curves)
    draw(
        folder / "shattered.png",
        [("fully connected, one input", [*paper, *curves[-2:]]), ("between two digits", [*ours, *curves[-2:]])],
        "gradients along a line at initial values (Balduzzi et al. 2017)",
    )
