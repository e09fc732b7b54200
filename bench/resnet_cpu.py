"""Training step and inference of a torchvision model on the CPU, eager against fused, in one process.

    python -m fusedres.bench.resnet_cpu --model resnet50 --batch 8 --px 224 --threads 2 --rounds 7

Both models start from the same weights and must first agree on the loss of one batch and on every parameter's
gradient. Then they take turns, the first changing every round, so that a slow phase of the machine hits both.
Times are medians with 20 % and 80 % quantiles; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import fusedres

__all__ = ["Timing", "gate", "inference_step", "interleave", "training_step"]

LOSS_TOLERANCE = 1e-4
# ReLUs whose input is within rounding of zero flip, so that even eager in two memory formats differs by 2e-2
# to 4e-2 (ResNet-50, 64 and 96 px); a wrong formula in a backward is off by the order of 1.
GRADIENT_TOLERANCE = 0.1


@dataclass(frozen=True)
class Timing:
    """Seconds of one (workload, model) pair over the measured rounds."""

    workload: str
    model: str
    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, workload: str, model: str, seconds: list[float]) -> Timing:
        values = torch.tensor(seconds, dtype=torch.float64)
        low, high = values.quantile(torch.tensor([0.2, 0.8], dtype=torch.float64)).tolist()
        return cls(workload, model, statistics.median(seconds), low, high, len(seconds))


def interleave(steps: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each step in each of `rounds` rounds, after `warm_up` rounds that are thrown away."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i_round in range(warm_up + rounds):
        order = list(steps) if i_round % 2 == 0 else list(steps)[::-1]
        for name in order:
            start = time.perf_counter()
            steps[name]()
            elapsed = time.perf_counter() - start
            if i_round >= warm_up:
                seconds[name].append(elapsed)
    return seconds


def training_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A function that makes one step: zero_grad, forward, cross entropy, backward, SGD with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def inference_step(model: nn.Module, images: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A function that runs `model` once under `torch.inference_mode`."""

    def step() -> torch.Tensor:
        with torch.inference_mode():
            return model(images)

    return step


def gate(eager: nn.Module, fused: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, train: bool) -> None:
    """Refuse to time models that do not compute the same thing. Leaves both models as they were.

    Raises:
        RuntimeError: loss or gradients (training), or logits (inference), differ by more than rounding.
    """
    a, b = copy.deepcopy(eager).train(train), copy.deepcopy(fused).train(train)
    if not train:
        with torch.inference_mode():
            _refuse_beyond(LOSS_TOLERANCE, "logits", b(images), a(images))
        return

    losses = [F.cross_entropy(model(images), labels) for model in (a, b)]
    for loss in losses:
        loss.backward()
    _refuse_beyond(LOSS_TOLERANCE, "loss", losses[1].detach(), losses[0].detach())
    gradients = [{name: p.grad for name, p in m.named_parameters() if p.grad is not None} for m in (a, b)]
    if gradients[0].keys() != gradients[1].keys():
        odd = sorted(gradients[0].keys() ^ gradients[1].keys())
        raise RuntimeError(f"only one of eager and fused has a gradient of {odd[0]}; no times are reported")
    flat = [torch.cat([gradient.flatten() for gradient in named.values()]) for named in gradients]
    _refuse_beyond(GRADIENT_TOLERANCE, "gradients", flat[1], flat[0])


def _refuse_beyond(tolerance: float, what: str, fused: torch.Tensor, eager: torch.Tensor) -> None:
    difference = relative_error(fused, eager)
    if not difference <= tolerance:
        raise RuntimeError(f"eager and fused {what} differ by {difference:.1e}; no times are reported")


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual − expected| / |expected|, Euclidean norms, in fp64."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fusedres.bench.resnet_cpu", description=__doc__)
    parser.add_argument("--model", default="resnet50", help="a torchvision model (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--px", type=int, default=224, help="height and width of the images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7, help="rounds measured, after two of warm-up")
    parser.add_argument("--train", action="store_true", help="only the training step")
    parser.add_argument("--infer", action="store_true", help="only inference")
    parser.add_argument("--schedule", default="auto", help="schedule of the fused model")
    parser.add_argument("--csv", type=Path, help="also write the timings to this file")
    options = parser.parse_args(arguments)
    if min(options.batch, options.px, options.threads, options.rounds) < 1:
        parser.error("--batch, --px, --threads and --rounds must be at least 1")

    import torchvision

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    try:
        eager = torchvision.models.get_model(options.model)
    except ValueError as error:
        parser.error(str(error))
    eager = eager.to(memory_format=torch.channels_last)
    fused = fusedres.fuse(copy.deepcopy(eager), schedule=options.schedule)
    images = torch.randn(options.batch, 3, options.px, options.px).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (options.batch,))

    workloads = [name for name, only in (("train", options.train), ("infer", options.infer)) if only]
    timings: list[Timing] = []
    for workload in workloads or ["train", "infer"]:
        training = workload == "train"
        try:
            gate(eager, fused, images, labels, train=training)
        except RuntimeError as error:
            print(f"{workload}: {error}", file=sys.stderr)
            return 1
        # Copies, since training steps would send inference off from two slightly different sets of weights.
        models = {name: copy.deepcopy(model).train(training) for name, model in (("eager", eager), ("fused", fused))}
        steps = {
            name: training_step(model, images, labels) if training else inference_step(model, images)
            for name, model in models.items()
        }
        seconds = interleave(steps, rounds=options.rounds)
        timings += [Timing.of(workload, name, values) for name, values in seconds.items()]

    print(
        f"{options.model}, batch {options.batch}, {options.px} px, fp32, channels_last, CPU,"
        f" {options.threads} threads, schedule {options.schedule}, torch {torch.__version__}"
    )
    print(f"{'workload':10}{'model':8}{'median ms':>11}{'20 %':>9}{'80 %':>9}{'of eager':>10}")
    for row in timings:
        base = next(other.median for other in timings if (other.workload, other.model) == (row.workload, "eager"))
        print(
            f"{row.workload:10}{row.model:8}{row.median * 1e3:11.1f}{row.low * 1e3:9.1f}{row.high * 1e3:9.1f}"
            f"{row.median / base:10.3f}"
        )
    if options.csv is not None:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(asdict(timings[0])))
            writer.writeheader()
            writer.writerows(asdict(row) for row in timings)
        print(f"wrote {options.csv}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
