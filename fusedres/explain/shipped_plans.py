"""The predicted plans that come with the package: ``python -m fusedres.explain.shipped_plans`` writes them anew.

They spare the prediction in a first step on the GPUs that most people have, and say what is thought to be found there.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import torch

from fusedres.models.sources import source
from fusedres.plan.gpus import gpu_named
from fusedres.runtime.plans import SHIPPED, Plan, write
from fusedres.traffic.meta_autocast import meta_autocast
from fusedres.tuning import estimate

GPUS = ("h100", "h200", "a100", "rtx4090")
MODELS = ("torchvision.resnet18", "torchvision.resnet50")
# Images of a training step, and of an inference.
TRAINING, INFERENCE = (64, 128, 256), (1, 256)
DTYPE = torch.bfloat16
DIGITS = 4


def steps() -> Iterator[tuple[str, int, bool]]:
    """Model, batch, and whether it is inference."""
    yield from itertools.product(MODELS, TRAINING, [False])
    yield from itertools.product(MODELS, INFERENCE, [True])


def predicted_for(gpu: str, model: str, batch: int, infer: bool) -> Plan:
    """What one step is predicted to run best on."""
    found = source(model)
    images = torch.empty(batch, *found.size, device="meta").contiguous(memory_format=torch.channels_last)
    told = estimate(
        found.on_meta(), images, gpu_named(gpu), infer=infer, title=model, inside=False,
        autocast=lambda: meta_autocast(DTYPE),
    )  # fmt: skip
    return told.plan


def plan_for(gpu: str) -> Plan:
    """All of it for one GPU."""
    whole = Plan.of(gpu_named(gpu), measured=False)
    for step in steps():
        whole.decisions.add(predicted_for(gpu, *step).decisions)
    for sizes in whole.decisions.entries["block"].values():
        for choice in sizes.values():
            choice["ms"] = {name: _rounded(ms) for name, ms in choice["ms"].items()}
    return whole


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def main(arguments: list[str]) -> Any:
    for gpu in arguments or GPUS:
        path = SHIPPED / f"{gpu}.json"
        if not write(plan_for(gpu), path):
            return 1
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
