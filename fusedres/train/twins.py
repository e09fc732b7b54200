"""The demonstration: train on real digits, plain and fused side by side, and check a foreign ResNet-50.

All models start from the same seed and see the same batches in lock-step, so their losses can be compared
step by step. Two correct fp32 runs still drift apart: each rounds differently, and training amplifies any
difference. How far is shown by a control, the plain model in PyTorch's other memory format, which rounds
differently too.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

import fusedres
from fusedres.models import cifar_resnet
from fusedres.traffic.saved import saved_bytes
from fusedres.train.digits import Digits, batches

PEAK_LEARNING_RATE = 0.1
# Correct implementations differ in rounding alone: each is about as far from fp64 as the other.
ERROR_FACTOR = 1.5
# Below the rounding of a loss in fp32: a difference of 0 is drawn there.
LEAST_DIFFERENCE = 1e-8


@dataclass
class Twin:
    """One of the models, its optimiser, and what was measured: a loss and a duration per step."""

    name: str
    model: nn.Module
    memory_format: torch.memory_format
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    @classmethod
    def of(cls, name: str, model: nn.Module, steps: int, memory_format: torch.memory_format) -> Twin:
        """SGD with momentum; the learning rate rises over a fifth of `steps`, then falls as a cosine."""
        optimizer = torch.optim.SGD(model.parameters(), lr=PEAK_LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps, pct_start=0.2)
        return cls(name, model.to(memory_format=memory_format), memory_format, optimizer, schedule)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """One training step, timed from zero_grad to the update."""
        images = images.contiguous(memory_format=self.memory_format)
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)
        self.schedule.step()

    def evaluate(self, digits: Digits) -> None:
        """Fraction of test images classified correctly, with the running statistics of batch norm."""
        self.model.eval()
        with torch.inference_mode():
            predicted = self.model(digits.test_images.contiguous(memory_format=self.memory_format)).argmax(1)
        self.accuracy = (predicted == digits.test_labels).float().mean().item()
        self.model.train()


class Twins(NamedTuple):
    """Trained in lock-step. `control` is `plain` in the other memory format."""

    plain: Twin
    fused: Twin
    control: Twin


@dataclass(frozen=True)
class ForeignCheck:
    """torchvision's resnet50: relative errors against an fp64 copy of the unfused model, and saved bytes."""

    report: str
    output_error: dict[str, float]
    gradient_error: dict[str, float]
    saved_per_image: dict[str, float]

    @property
    def passed(self) -> bool:
        """The fused model is as close to fp64 as eager PyTorch is. A NaN on either side fails."""
        return all(
            error["fused"] <= ERROR_FACTOR * error["eager"] for error in (self.output_error, self.gradient_error)
        )


def channels_last(images: torch.Tensor) -> torch.Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def train_twins(
    digits: Digits,
    *,
    epochs: int,
    batch: int,
    seed: int,
    schedule: str = "memory",
    on_step: Callable[[], None],
    on_epoch: Callable[[int, Twins], None],
) -> Twins:
    """Train ResNet-20 three times in lock-step; which one goes first changes every step."""
    steps_per_epoch = len(digits.train_labels) // batch

    def twin(name: str, fused: bool, memory_format: torch.memory_format) -> Twin:
        torch.manual_seed(seed)
        model = cifar_resnet(20, in_channels=1, fused=fused)
        if fused:
            fusedres.fuse(model, schedule=schedule)
        return Twin.of(name, model, epochs * steps_per_epoch, memory_format)

    twins = Twins(
        twin("plain", False, torch.channels_last),
        twin("fused", True, torch.channels_last),
        twin("plain, NCHW", False, torch.contiguous_format),
    )
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        for i_step, (images, labels) in enumerate(batches(digits, batch, generator=generator)):
            first = i_step % len(twins)
            for one in (*twins[first:], *twins[:first]):
                one.step(images, labels)
            on_step()
        on_epoch(epoch, twins)
    for one in twins:
        one.evaluate(digits)
    return twins


def saved_by(plain: nn.Module, fused: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Bytes saved for backward by a training step, plain and fused."""

    def loss(model: nn.Module) -> torch.Tensor:
        return F.cross_entropy(model(channels_last(images)), labels)

    # Copies, since a forward in training mode moves the running statistics.
    plain, fused = copy.deepcopy(plain).train(), copy.deepcopy(fused).train()
    return {"plain": saved_bytes(plain, loss).total, "fused": saved_bytes(fused, loss).total}


def check_resnet50(
    seed: int,
    *,
    schedule: str = "memory",
    px: int = 96,
    batch: int = 8,
    repeats: int = 3,
    on_repeat: Callable[[], None] = lambda: None,
) -> ForeignCheck:
    """Fuse torchvision's resnet50 (random weights) and compare logits and gradients with the unfused model.

    Errors are |actual − exact| / |exact| over all values, as root mean square of `repeats` batches. A
    gradient's error comes mostly from single ReLUs that flip within rounding of zero; several large batches
    average that out.

    Raises:
        ImportError: torchvision is not installed.
    """
    from torchvision.models import resnet50

    torch.manual_seed(seed)
    eager = resnet50().to(memory_format=torch.channels_last)
    exact = copy.deepcopy(eager).double()
    fused = fusedres.fuse(copy.deepcopy(eager), schedule=schedule)
    output_squares: dict[str, list[float]] = {"eager": [], "fused": []}
    gradient_squares: dict[str, list[float]] = {"eager": [], "fused": []}
    for _ in range(repeats):
        images, labels = channels_last(torch.randn(batch, 3, px, px)), torch.randint(0, 1000, (batch,))
        exact_output, exact_gradient = _output_and_gradient(exact, images.double(), labels)
        for name, model in ("eager", eager), ("fused", fused):
            output, gradient = _output_and_gradient(model, images, labels)
            output_squares[name].append(_relative_error(output, exact_output) ** 2)
            gradient_squares[name].append(_relative_error(gradient, exact_gradient) ** 2)
        on_repeat()

    saved = saved_by(eager, fused, images, labels)
    return ForeignCheck(
        report=str(fusedres.report(fused)),
        output_error={name: statistics.fmean(squares) ** 0.5 for name, squares in output_squares.items()},
        gradient_error={name: statistics.fmean(squares) ** 0.5 for name, squares in gradient_squares.items()},
        saved_per_image={name: nbytes / batch for name, nbytes in saved.items()},
    )


def _output_and_gradient(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    output = model(images)
    F.cross_entropy(output, labels).backward()
    return output.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


@dataclass(frozen=True)
class Predicted:
    """What is predicted of ResNet-50 on a GPU: a sentence, and milliseconds of a step by name."""

    sentence: str
    gpu: str
    ms: dict[str, float]


def draw(
    path: Path, twins: Twins, saved: dict[str, float], check: ForeignCheck | None, predicted: Predicted | None, *,
    batch: int,
) -> None:  # fmt: skip
    """One PNG: the losses of the twins, their differences, and bars for what was measured and what is predicted."""
    bars = [(saved, f"ResNet-20, batch of {batch}\nsaved for backward, measured", "MB", 1e6)]
    if check is not None:
        bars.append((check.saved_per_image, "torchvision resnet50\nsaved for backward, measured", "MB per image", 1e6))
    if predicted is not None:
        bars.append((predicted.ms, f"ResNet-50 on {predicted.gpu}\npredicted, not measured", "ms a step", 1.0))
    figure = Figure(figsize=(8.4 + 2.6 * len(bars), 4.2), layout="constrained")
    losses, apart, *axes = figure.subplots(1, 2 + len(bars), width_ratios=[1.5, 1.5, *[1] * len(bars)])

    steps = range(1, len(twins.plain.losses) + 1)
    losses.semilogy(steps, twins.plain.losses, color="tab:blue", linewidth=4, alpha=0.4, label="plain")
    losses.semilogy(steps, twins.fused.losses, color="tab:orange", linewidth=1.2, label="fused")
    losses.set(title="ResNet-20 on handwritten digits", xlabel="step", ylabel="cross entropy (nats)")
    losses.legend(fontsize="small")
    for twin, color, width, label in (
        (twins.control, "tab:gray", 3.0, "plain in NCHW"), (twins.fused, "tab:red", 1.0, "fused"),
    ):  # fmt: skip
        shown = [max(one, LEAST_DIFFERENCE) for one in differences(twin.losses, twins.plain.losses)]
        apart.semilogy(steps, shown, color=color, linewidth=width, alpha=0.5 if width > 1 else 1, label=label)
    apart.set(
        title="how far a loss is from plain's", xlabel="step", ylabel=f"nats, at least {LEAST_DIFFERENCE:g}",
    )  # fmt: skip
    apart.legend(fontsize="small")
    for place, (values, title, unit, scale) in zip(axes, bars, strict=True):
        _bars(place, {name: value / scale for name, value in values.items()}, title, unit)
    figure.savefig(path, dpi=120)


def differences(losses: list[float], others: list[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(losses, others, strict=True)]


def _bars(axes: Axes, values: dict[str, float], title: str, unit: str) -> None:
    bars = axes.bar(list(values), list(values.values()), color=["tab:blue", "tab:orange"])
    axes.bar_label(bars, fmt="%.1f")
    axes.set_title(title, fontsize="medium")
    axes.set_ylabel(unit)
    axes.margins(y=0.12)
