"""Fused and plain twins from one seed learn the same: in fp64, where an error of algebra can not pass for rounding."""

import dataclasses

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from fusedres.models import names
from fusedres.nn.fused import Fused
from fusedres.train.augment import Augment, measure
from fusedres.train.data import open_data
from fusedres.train.distributed import World
from fusedres.train.evaluation import Evaluator
from fusedres.train.logs import Logs
from fusedres.train.network import build
from fusedres.train.recipe import recipe
from fusedres.train.sources import Arrays
from fusedres.train.stopping import Stopping
from fusedres.train.trainer import Settings, Trainer, seed_everything

STEPS = 5
RATE = 0.01
# The losses of the first step differ by rounding alone; each step amplifies what it finds, in deep networks with few
# images a batch up to a hundredfold.
ROUNDING, AMPLIFICATION = 1e-13, 100
# One network of every kind.
KINDS = (
    "cifar_resnet20", "cifar_plain20", "resnet18", "resnet50", "preact_resnet110", "resnet110_exclusive_gating",
    "resnet110_shortcut_gating", "resnet110_constant_scaling", "resnet110_bn_after_add", "resnet110_relu_before_add",
    "resnet110_relu_only", "densenet40_k12", "densenet_bc100_k12", "stochastic_resnet110",
    "wide_resnet40_1", "resnext29_8x64", "iresnet50", "mobilenet_v2", "seresnet50",
)  # fmt: skip


class InDouble(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x.double())


class Recorder(Logs):
    def __init__(self) -> None:
        super().__init__(None, "", STEPS, "test")
        self.losses: list[float] = []

    def step(self, step, epoch, lr, loss, error, speed, memory):
        self.losses.append(loss)


def train(name: str, *, fused: bool, schedule: str) -> tuple[list[float], nn.Module]:
    seed_everything(0)
    chosen = recipe("digits").lasting(STEPS, "iterations")
    data = open_data("digits", chosen.crop)
    source = Arrays(data.train.images[:96], data.train.labels[:96])
    network = build(name, classes=10, channels=1, fused=fused, schedule=schedule)
    channels = network.channels if network.channels != 1 else None
    augment = Augment(measure(source, "channel"), chosen.crop, background=data.background, channels=channels)
    here = World(0, 1, torch.device("cpu"))
    trainer = Trainer(
        InDouble(network.model), dataclasses.replace(chosen, batch=16, lr=RATE), source,
        Evaluator(Arrays(data.test.images[:32], data.test.labels[:32]), augment, here, batch=32), augment, here,
        Settings(seed=0), config={}, folder=None,
    )  # fmt: skip
    logs = Recorder()
    trainer.run(logs, Stopping())
    return logs.losses, network.model


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("cifar_resnet20", "auto"),
        pytest.param("cifar_resnet20", "moments", marks=pytest.mark.slow),
        *(pytest.param(name, "auto", marks=pytest.mark.slow) for name in KINDS[1:] if name in names()),
    ],
)
def test_twins_have_the_same_curves(name, schedule, monkeypatch):
    monkeypatch.setattr("fusedres.train.trainer.LOOK_EVERY", 1)
    fused, plain = (train(name, fused=fused, schedule=schedule) for fused in (True, False))
    assert any(isinstance(module, Fused) for module in fused[1].modules())
    assert not any(isinstance(module, Fused) for module in plain[1].modules())
    assert len(fused[0]) == len(plain[0]) == STEPS
    for step, (one, other) in enumerate(zip(fused[0], plain[0], strict=True)):
        assert one == pytest.approx(other, rel=ROUNDING * AMPLIFICATION**step), f"step {step}"
