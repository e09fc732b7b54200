"""Shattered gradients: Balduzzi et al. 2017, arXiv:1702.08591.

Along a line through the inputs, the gradient of a deep plain network at its initial values looks like white noise, that
of a shallow one like brown noise, and that of a residual network lies between (section 2 and figure 1). The measure is
the autocorrelation of the gradient along the line. For two unrelated inputs the correlation of their gradients falls as
1/2^L with depth in plain networks (theorem 1), as 1/√L in residual networks with batch norm (theorem 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from fusedres.studies.pictures import lines
from fusedres.studies.study import Finding, Lab, Row, Setting, Study, Table, decided
from fusedres.studies.training import Spec
from fusedres.train.network import build

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["SHATTERED"]

# Of figure 1: a grid of 256 inputs, 200 units a layer.
POINTS = 256
WIDTH = 200
REACH = 2.0

CONNECTED = {"plain, 1 layer": ("plain", 1), "plain, 24 layers": ("plain", 24), "residual, 50 layers": ("residual", 50)}
NOISE = ("white noise", "brown noise")
INPUTS = 64
# Deeper, the correlation of plain networks is below what can be told from 0 with so many inputs and units.
DEPTHS: Mapping[str, Sequence[int]] = {"plain": range(1, 9), "residual": (1, 2, 4, 8, 16, 32, 64)}


def _networks(setting: Setting) -> Sequence[Spec]:
    return []


def _between(setting: Setting) -> Mapping[str, str]:
    """Networks that are looked at along a line between two images, by label."""
    depth = 110 if setting.full else 56
    return {f"ResNet-{depth}": f"cifar_resnet{depth}", "plain-56": "cifar_plain56"}


def autocorrelation(gradient: torch.Tensor) -> torch.Tensor:
    """Of (D, N) gradients at N points of a line, (N/2,) by lag: Σ_d Σ_i g(i)g(i+lag) / Σ_d Σ_i g(i)², per pair."""
    centred = (gradient - gradient.mean(-1, keepdim=True)).double()
    N = centred.shape[-1]
    products = [(centred[..., : N - lag] * centred[..., lag:]).sum() / (N - lag) for lag in range(N // 2)]
    return torch.stack(products) / products[0]


def _normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def network_gradient(kind: str, depth: int, generator: torch.Generator, *, beta: float = 0.1) -> torch.Tensor:
    """df/dx (1, 256) of a fully connected network with a scalar input at its initial values (He et al. 2015).

    Args:
        kind: "plain", whose layers centre their input over the grid (batch norm without the division), or
            "residual", x + β·W·relu(bn(x)), equation 2 of the paper.
        depth: hidden layers.
        generator: of weights and of the first layer's kinks, which are spread over the grid.
        beta: scale of the residuals.
    """
    x = torch.linspace(-REACH, REACH, POINTS, dtype=torch.float64)[:, None].requires_grad_()
    kinks = REACH * (2 * torch.rand(WIDTH, generator=generator, dtype=torch.float64) - 1)
    hidden = (x - kinks) * _normal(generator, WIDTH)
    for _ in range(depth - 1):
        weight = _normal(generator, WIDTH, WIDTH) * (2 / WIDTH) ** 0.5
        if kind == "residual":
            deviation, mean = torch.std_mean(hidden, 0, correction=0)
            hidden = hidden + beta * ((hidden - mean) / (deviation + 1e-5)).relu() @ weight
        else:
            hidden = hidden.relu() @ weight
            hidden = hidden - hidden.mean(0)
    output = hidden.relu() @ _normal(generator, WIDTH)
    return torch.autograd.grad(output.sum(), x)[0].T


def correlation(kind: str, depth: int, generator: torch.Generator) -> float:
    """Of the gradients of two unrelated inputs at the first layer: ⟨g, g'⟩ / |g||g'|, the mean over all pairs.

    Batch norm's statistics are taken as constants, so that an output depends on one input.

    Args:
        kind: "plain", W·relu(bn(x)), or "residual", x + W·relu(bn(x)).
        depth: ReLUs of the plain network, blocks of the residual one (a last layer reads its sum).
        generator: of weights and inputs.
    """
    first = _normal(generator, INPUTS, WIDTH).requires_grad_()
    hidden = first
    for _ in range(depth):
        deviation, mean = torch.std_mean(hidden.detach(), 0, correction=0)
        out = ((hidden - mean) / deviation).relu() @ (_normal(generator, WIDTH, WIDTH) * (2 / WIDTH) ** 0.5)
        hidden = hidden + out if kind == "residual" else out
    (gradient,) = torch.autograd.grad((hidden @ _normal(generator, WIDTH)).sum(), first)
    unit = gradient / gradient.norm(dim=1, keepdim=True)
    return float((unit.sum(0).square().sum() - INPUTS) / (INPUTS * (INPUTS - 1)))


def line_gradient(model: nn.Module, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """d logit / dt (classes, 256) of ``model`` along the line from image ``start`` to image ``end``.

    Batch norm takes its statistics from the line, as in training.
    """
    model.train()
    t = torch.linspace(0, 1, POINTS).requires_grad_()
    logits = model(start + t[:, None, None, None] * (end - start))
    rows = [torch.autograd.grad(logits[:, i].sum(), t, retain_graph=True)[0] for i in range(logits.shape[1])]
    return torch.stack(rows).detach()


def _curve(name: str, gradients: Iterable[torch.Tensor]) -> Iterable[Row]:
    """The autocorrelation of each by lag, and the first gradient, its largest value 1, by point of the line."""
    for i, gradient in enumerate(gradients):
        for lag, value in enumerate(autocorrelation(gradient).tolist()):
            yield Row(name, lag, value)
        if i == 0:
            for point, value in enumerate((gradient[0] / gradient[0].abs().max()).tolist()):
                yield Row(f"{name}, gradient", point, value)


def _measure(lab: Lab) -> Iterable[Row]:
    generator, draws = lab.generator(), lab.setting.draws
    for name, (kind, depth) in CONNECTED.items():
        yield from _curve(name, (network_gradient(kind, depth, generator) for _ in range(draws)))
    train, _ = lab.images
    torch.manual_seed(lab.seed)
    for label, name in _between(lab.setting).items():
        gradients = []
        for _ in range(draws):
            start, end = train.pixels[torch.randperm(len(train.pixels), generator=generator)[:2]]
            model = build(name, classes=10, channels=train.pixels.shape[1], fused=False).model
            gradients.append(line_gradient(model, start, end))
        yield from _curve(label, gradients)
    white = [_normal(generator, 1, POINTS) for _ in range(draws)]
    for name, noise in zip(NOISE, (white, [one.cumsum(1) for one in white]), strict=True):
        yield from _curve(name, noise)
    for kind, depths in DEPTHS.items():
        for depth in depths:
            for _ in range(draws):
                yield Row(f"correlation, {kind}", depth, correlation(kind, depth, generator))


def fits(table: Table) -> tuple[float, float]:
    """The a of R = a^L for plain networks, and the p of R ~ L^p for residual ones, by least squares of logarithms."""
    plain = [(point.x, math.log(point.mean)) for point in table.of("correlation, plain") if point.mean > 0]
    rate = sum(x * y for x, y in plain) / sum(x * x for x, _ in plain)
    residual = [(math.log(point.x), math.log(point.mean)) for point in table.of("correlation, residual")]
    middle = [sum(values) / len(residual) for values in zip(*residual, strict=True)]
    power = sum((x - middle[0]) * (y - middle[1]) for x, y in residual) / sum((x - middle[0]) ** 2 for x, _ in residual)
    return math.exp(rate), power


def _found(table: Table) -> Finding:
    plain, residual = (table.last(f"correlation, {kind}") for kind in DEPTHS)
    rate, power = fits(table)
    depths = [int(point.x) for point in (plain, residual)]
    at_lag = ", ".join(f"{name} {table.at(name, 10).mean:.2f}" for name in (*CONNECTED, *NOISE))
    gap, spread = residual.mean - plain.mean, residual.std + plain.std
    # The power need not be -1/2: theorem 3 has every block add a variance of 1. Centred by batch norm, it is
    # 1 - 1/π, with which the power becomes -0.73 as L grows. "Sublinearly" is what the paper concludes.
    verdict = decided(gap > spread and abs(rate - 0.5) < 0.1 and power > -1, -gap > spread)
    return Finding(
        f"gradients of two inputs correlate as {rate:.2f}^L in plain networks ({plain.mean:.4f} at L = {depths[0]}),"
        f" as L^{power:.2f} in residual ones ({residual.mean:.2f} at L = {depths[1]}); autocorrelation at lag 10:"
        f" {at_lag}",
        verdict,
    )


def _column(examples: Axes, correlations: Axes, table: Table, names: Sequence[str], title: str) -> None:
    seed, rows = next(iter(table.rows.items()))
    one = Table({seed: rows})  # the mean of several examples would be none
    for i, name in enumerate(names):
        points = one.of(f"{name}, gradient")
        examples.plot([p.x for p in points], [p.mean - 2.2 * i for p in points], linewidth=0.8, color=f"C{i}")
        lines(correlations, table, [name], color=f"C{i}")
    examples.set(title=title, xlabel="point of the line")
    examples.set_yticks([-2.2 * i for i in range(len(names))], names)
    correlations.set(xlabel="lag", ylabel="autocorrelation of the gradient")


def _draw(figure: Figure, table: Table) -> None:
    figure.set_size_inches(18, 8)
    panels = figure.subplots(2, 3)
    between = [name for name in table.series if name.startswith(("ResNet-", "plain-")) and "gradient" not in name]
    columns = (("fully connected, one input", list(CONNECTED)), ("between two images", between))
    for i, (title, names) in enumerate(columns):
        _column(panels[0, i], panels[1, i], table, [*names, *NOISE], title)
    rate, power = fits(table)
    plain, residual = panels[0, 2], panels[1, 2]
    lines(plain, table, {"correlation, plain": "plain, measured"}, marker="o", linestyle="")
    depths = list(DEPTHS["plain"])
    plain.plot(depths, [0.5**L for L in depths], ":", label="1/2^L (theorem 1)")
    plain.plot(depths, [rate**L for L in depths], linewidth=0.8, label=f"fit: {rate:.2f}^L")
    plain.set(xlabel="layers L", title="gradients of two inputs")
    lines(residual, table, {"correlation, residual": "residual with batch norm, measured"}, marker="o", linestyle="")
    depths = list(DEPTHS["residual"])
    for exponent, style, label in ((-0.5, ":", "~ 1/√L (theorem 3)"), (power, "-", f"fit: ~ L^{power:.2f}")):
        # Both through the mean of the measured points, on these axes.
        points = table.of("correlation, residual")
        scale = math.exp(sum(math.log(p.mean) - exponent * math.log(p.x) for p in points) / len(points))
        residual.plot(depths, [scale * L**exponent for L in depths], style, linewidth=1, label=label)
    residual.set(xlabel="blocks L", xscale="log")
    for axes in (plain, residual):
        axes.set(yscale="log", ylabel="correlation")
        axes.legend(fontsize="small")
    figure.suptitle("gradients at initial values (Balduzzi et al. 2017, figures 1 and 2, theorems 1 and 3)")


SHATTERED = Study(
    "shattered", "Balduzzi et al. 2017, arXiv:1702.08591, figure 1, theorems 1 and 3",
    "gradients of two inputs correlate as 1/2^L in plain networks of depth L, as 1/√L in residual ones with batch norm",
    _networks, _measure, _found, _draw,
)  # fmt: skip
