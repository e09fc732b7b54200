"""A network that takes milliseconds, contenders that misbehave, and rows that nobody measured."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from fusedres.bench.cases import Case, ModelCase
from fusedres.bench.contenders import CONTENDERS, Contender
from fusedres.bench.rows import OK, Row
from fusedres.bench.setting import Setting, device_named
from fusedres.bench.steps import Step

CPU = device_named("cpu")


def build() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), BasicBlock(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )


NETWORK = ModelCase("tiny", "network", build, 3, 8, 4)
TRAIN = Setting("train", "fp32", 4, 8, CPU)
INFER = replace(TRAIN, mode="infer")


def contender(name: str, change: Callable[[nn.Module], Any], **attributes: Any) -> Contender:
    """Eager PyTorch after a change of the model."""

    def prepare(case: Case, setting: Setting, operands: tuple[Any, ...]) -> Step:
        change(operands[0])
        return CONTENDERS["eager"].prepare(case, setting, operands)

    return Contender(name, "for tests", prepare, **attributes)


class Scaled(torch.autograd.Function):
    """The same output, another gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.factor * gradient, None


def hook_output(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    module.register_forward_hook(lambda _module, _inputs, output: change(output))


def wrong_gradient(model: Any) -> None:
    """The first convolution's gradient comes out doubled."""
    hook_output(model[0], lambda output: Scaled.apply(output, 2.0))


def wrong_output(model: Any) -> None:
    with torch.no_grad():
        model[0].weight[0] *= -1


def not_finite(model: Any) -> None:
    with torch.no_grad():
        model[5].bias[0] = float("nan")


def no_gradient(model: Any) -> None:
    model[0].weight.requires_grad_(False)


def sleepy(seconds: float) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        def sleep(output: torch.Tensor) -> torch.Tensor:
            time.sleep(seconds)
            return output

        hook_output(model[0], sleep)

    return change


def raising(error: Exception) -> Callable[[Any], None]:
    def change(_model: Any) -> None:
        raise error

    return change


def row(contender: str = "fused", **figures: Any) -> Row:
    """A row as a GPU would give it; its figures are made up."""
    known: dict[str, Any] = {
        "case": "resnet50", "kind": "network", "mode": "train", "dtype": "fp16", "batch": 256, "px": 224, "status": OK,
        "images_per_s": 5000.0, "speedup": 2.0, "median_s": 0.0512, "low_s": 0.05, "high_s": 0.06, "rounds": 20,
        "first_step_s": 3.0, "error": 1e-3, "bound": 3e-2, "peak_bytes": 10**10, "launches": 400,
        "declared_whole": True, "gb_per_s": 1500.0, "tflop_per_s": 200.0,
        "peak_gb_per_s": 2500.0, "peak_tflop_per_s": 700.0,
        "device": "NVIDIA H100 80GB HBM3", "driver": "0", "threads": 8, "date": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return Row(contender=contender, **(known | figures))
