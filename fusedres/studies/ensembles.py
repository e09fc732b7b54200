"""Residual networks as ensembles of paths: Veit, Wilber and Belongie 2016, arXiv:1605.06431.

Deleting a block of a trained residual network hardly hurts, deleting one of a plain network does (section 4.1); the
error rises smoothly with the number of deleted blocks and with their disorder (4.2, 4.3); and of the 2ⁿ paths, whose
lengths are binomial, only short ones carry gradient (section 5).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from fusedres.studies.dissect import Part, blocks_of, dissected_resnet
from fusedres.studies.training import Images, error_of, train_on_digits

__all__ = [
    "Point",
    "delete_each",
    "delete_some",
    "draw",
    "kendall",
    "middle",
    "path_gradients",
    "run",
    "shuffle_some",
    "write",
]


# The network that loses its shortcuts to be the plain one. The paper's has 15 layers; one of 56 hardly trains.
PLAIN = "cifar_resnet20"


class Point(NamedTuple):
    """One value of an experiment: ``mean`` and ``std`` over ``draws`` random choices, at ``x``."""

    experiment: str
    x: float
    mean: float
    std: float
    draws: int


def _point(experiment: str, x: float, values: Sequence[float]) -> Point:
    tensor = torch.tensor(values, dtype=torch.float64)
    return Point(experiment, x, float(tensor.mean()), float(tensor.std(correction=0)), len(values))


def delete_each(model: nn.Module, images: Images, experiment: str, *, keep: Part = "whole") -> list[Point]:
    """The test error without block 0, 1, ...; ``keep`` is the part that the other blocks have."""
    points = []
    for i, block in enumerate(blocks_of(model)):
        block.part = "shortcut"
        points.append(_point(experiment, i, [error_of(model, images)]))
        block.part = keep
    return points


def delete_some(model: nn.Module, images: Images, counts: Sequence[int], draws: int, seed: int) -> list[Point]:
    """The test error without so many random blocks."""
    generator = torch.Generator().manual_seed(seed)
    blocks = blocks_of(model)
    points = []
    for count in counts:
        errors = []
        for _ in range(draws):
            gone = [blocks[int(i)] for i in torch.randperm(len(blocks), generator=generator)[:count]]
            for block in gone:
                block.part = "shortcut"
            errors.append(error_of(model, images))
            for block in gone:
                block.part = "whole"
        points.append(_point("delete random blocks", count, errors))
    return points


def kendall(order: Sequence[int]) -> float:
    """Kendall's rank correlation of a permutation with the original order."""
    pairs = [(a, b) for a in range(len(order)) for b in range(a)]
    return sum(math.copysign(1, order[a] - order[b]) for a, b in pairs) / len(pairs)


def shuffle_some(model: nn.Module, images: Images, swaps: Sequence[int], draws: int, seed: int) -> list[Point]:
    """The test error after so many random swaps of blocks of the same shape, against Kendall's τ of the order."""
    generator = torch.Generator().manual_seed(seed)
    blocks = blocks_of(model)
    stages = [module for module in model.children() if isinstance(module, nn.Sequential)]
    groups = [[blocks.index(block) for block in stage if block.keeps_shape] for stage in stages]
    groups = [group for group in groups if len(group) > 1]
    own = [block.block for block in blocks]
    points = []
    for count in swaps:
        for _ in range(draws):
            order = list(range(len(blocks)))
            for _ in range(count):
                group = groups[int(torch.randint(len(groups), (), generator=generator))]
                a, b = (group[int(i)] for i in torch.randperm(len(group), generator=generator)[:2])
                order[a], order[b] = order[b], order[a]
            for block, i in zip(blocks, order, strict=True):
                block.block = own[i]
            points.append(_point("permute blocks", kendall(order), [error_of(model, images)]))
    for block, module in zip(blocks, own, strict=True):
        block.block = module
    return points


def path_gradients(model: nn.Module, images: Images, draws: int, seed: int) -> list[Point]:
    """Norm of the loss's gradient at the input along random paths of every length, and what all of them carry."""
    generator = torch.Generator().manual_seed(seed)
    blocks = blocks_of(model)
    total = len(blocks)
    model.eval()
    norms = []
    for length in range(total + 1):
        values = []
        for _ in range(draws):
            chosen = set(torch.randperm(total, generator=generator)[:length].tolist())
            for i, block in enumerate(blocks):
                block.part = "gradient by residual" if i in chosen else "gradient by shortcut"
            x = images.pixels.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), images.labels), x)
            values.append(float(gradient.norm()))
        norms.append(_point("gradient of a path", length, values))
    for block in blocks:
        block.part = "whole"
    shares = [math.comb(total, length) / 2**total for length in range(total + 1)]
    carried = [share * point.mean for share, point in zip(shares, norms, strict=True)]
    whole = sum(carried)
    return [
        *norms,
        *(Point("share of paths", length, share, 0.0, 1) for length, share in enumerate(shares)),
        *(Point("share of gradient", length, part / whole, 0.0, 1) for length, part in enumerate(carried)),
    ]


def middle(points: Sequence[Point], experiment: str, share: float = 0.9) -> tuple[int, int]:
    """The lengths between which ``share`` of an experiment's distribution lies, the same on either side."""
    values = [point.mean for point in points if point.experiment == experiment]
    sums = torch.tensor(values, dtype=torch.float64).cumsum(0)
    return tuple(int((sums < bound).sum()) for bound in ((1 - share) / 2, (1 + share) / 2))  # type: ignore[return-value]


def write(path: Path, points: Sequence[Point]) -> None:
    """Every point as a line of CSV."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Point._fields)
        writer.writerows(points)


def draw(path: Path, points: Sequence[Point], title: str) -> None:
    """Four panels, after figures 3, 5 and 6 of the paper."""
    from matplotlib.figure import Figure

    def of(experiment: str) -> tuple[list[float], list[float], list[float]]:
        chosen = sorted(point for point in points if point.experiment == experiment)
        return [p.x for p in chosen], [p.mean for p in chosen], [p.std for p in chosen]

    figure = Figure(figsize=(11, 8), layout="constrained")
    (one, some), (disorder, paths) = figure.subplots(2, 2)
    for name in ("delete a residual block", "delete a plain block"):
        x, y, _ = of(name)
        one.plot(x, [100 * value for value in y], marker=".", label=name)
    one.set(xlabel="block that is deleted", ylabel="test error, %", title="one block deleted")
    one.legend()
    x, y, std = of("delete random blocks")
    some.errorbar(x, [100 * value for value in y], [100 * value for value in std], marker=".", capsize=2)
    some.set(xlabel="blocks deleted", ylabel="test error, %", title="random blocks deleted")
    x, y, _ = of("permute blocks")
    disorder.plot(x, [100 * value for value in y], ".", alpha=0.6)
    disorder.invert_xaxis()
    disorder.set(xlabel="Kendall's τ of the order", ylabel="test error, %", title="blocks permuted")
    for name in ("share of paths", "share of gradient"):
        x, y, _ = of(name)
        paths.plot(x, y, marker=".", label=name)
    paths.set(xlabel="length of path, blocks", ylabel="share", title="lengths of paths")
    norms = paths.twinx()
    x, y, _ = of("gradient of a path")
    norms.plot(x, y, ":", color="tab:green", label="gradient of one path (right)")
    norms.set(yscale="log", ylabel="norm of the gradient")
    paths.legend(loc="upper right")
    norms.legend(loc="center right")
    figure.suptitle(title)
    figure.savefig(path, format="png", dpi=120)


def run(name: str, folder: Path, *, epochs: int, seed: int, draws: int, say: Callable[[str], None]) -> None:
    """Train a residual and a plain network on digits, take both apart, write ensembles.csv and ensembles.png.

    Args:
        name: a residual network of basic blocks, such as cifar_resnet56.
        folder: exists.
        epochs, seed: of the training.
        draws: random choices per point.
        say: takes lines for people.
    """

    def trained(network: str, part: Part) -> tuple[nn.Module, Images, Images, list[Point]]:
        kind = "residual" if part == "whole" else "plain"
        torch.manual_seed(seed)
        model = dissected_resnet(network, part=part)
        train, test = train_on_digits(model, epochs=epochs, seed=seed)
        error = error_of(model, test)
        one = delete_each(model, test, f"delete a {kind} block", keep=part)
        median = sorted(point.mean for point in one)[len(one) // 2]
        say(
            f"{kind} network of {2 * len(one) + 2} layers: test error {error:.2%}; without one block"
            f" {median:.2%} (median), {max(point.mean for point in one):.2%} (worst)"
        )
        return model, train, test, one

    model, train, test, points = trained(name, "whole")
    points += trained(PLAIN, "residual")[-1]
    count = len(blocks_of(model))
    points += delete_some(model, test, range(count + 1), draws, seed)
    points += shuffle_some(model, test, [2**i for i in range(6)], draws, seed)
    points += path_gradients(model, Images(train.pixels[:64], train.labels[:64]), draws, seed)
    typical, carrying = (middle(points, experiment) for experiment in ("share of paths", "share of gradient"))
    say(
        f"of {count} blocks, 90 % of all paths run through {typical[0]} to {typical[1]},"
        f" 90 % of the gradient through {carrying[0]} to {carrying[1]}"
    )
    write(folder / "ensembles.csv", points)
    draw(folder / "ensembles.png", points, f"{name} on digits: an ensemble of paths (Veit et al. 2016)")
