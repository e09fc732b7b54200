"""Thousands of steps on real images: fused and plain stay as near as rounding lets them, and nothing piles up."""

import copy
import gc
import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusedres
from fusedres.nn import plain
from fusedres.runtime import replay
from fusedres.train.digits import load_digits

BATCH = 32
PAGE = resource.getpagesize()


def network() -> nn.Module:
    torch.manual_seed(0)
    stem = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
    blocks = plain.BasicBlock(8, 8), plain.BasicBlock(8, 16, 2)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


class Held:
    """What is alive in this process."""

    def __init__(self) -> None:
        gc.collect()
        self.tensors = sum(issubclass(type(one), Tensor) for one in gc.get_objects())
        self.notes = len(replay._notes)
        self.bytes = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def train(steps: int, images: Tensor, labels: Tensor) -> tuple[list[float], list[list[float]], list[Held]]:
    """How far from the plain network's a nudged plain one's and the fused one's parameters are, and what was held."""
    twins = [network() for _ in range(3)]
    models = [twins[0], twins[1], fusedres.fuse(twins[2], schedule="prologue")]
    with torch.no_grad():
        for parameter in models[1].parameters():  # by half a unit in the last place, on average
            parameter.mul_(1 + torch.randn_like(parameter) * 2**-24)
    optimizers = [torch.optim.SGD(model.parameters(), 0.05, momentum=0.9) for model in models]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(one, steps) for one in optimizers]
    drawn = torch.Generator().manual_seed(0)
    losses: list[list[float]] = [[], [], []]
    held = []
    for step in range(steps):
        chosen = torch.randint(len(images), (BATCH,), generator=drawn)
        for i, model in enumerate(models):
            optimizers[i].zero_grad()
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            loss.backward()
            optimizers[i].step()
            schedulers[i].step()
            losses[i].append(float(loss))
        if step + 1 in (steps // 4, steps):
            held.append(Held())
    ends = [copy.deepcopy(model.eval()) for model in models]
    with torch.no_grad():
        outputs = [model(images).softmax(1) for model in ends]
    return [float((other - outputs[0]).norm() / outputs[0].norm()) for other in outputs[1:]], losses, held


def check(steps: int) -> None:
    digits = load_digits()
    (nudged, fused), losses, (early, late) = train(steps, digits.train_images, digits.train_labels)
    # Training is chaotic: what rounding does at first is what a nudge of that size does, within an order of magnitude.
    assert fused <= 10 * nudged, (fused, nudged)
    few = steps // 10
    ends = [sum(one[-few:]) / few for one in losses]
    assert all(end < sum(one[:few]) / few for end, one in zip(ends, losses, strict=True))
    # Fewer where what earlier tests of the process left was let go meanwhile.
    assert late.tensors <= early.tensors and late.notes <= early.notes
    # No more than a thousandth of what the steps between them made and let go.
    assert late.bytes - early.bytes < 2**23, late.bytes - early.bytes
    print(f"{steps} steps: nudged {nudged:.1e}, fused {fused:.1e}, losses {ends}, grown {late.bytes - early.bytes}")


def test_twenty_steps():
    check(20)


@pytest.mark.slow
def test_two_thousand_steps():
    check(2000)
