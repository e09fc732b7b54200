"""What a model saves for backward, eager and fused, in bytes per image.

    python -m fusedres.bench.saved_activations --model resnet50 --batch 64 --px 224 --schedule moments

Counted with `torch.autograd.graph.saved_tensors_hooks` plus whatever a custom Function keeps on its context,
every storage once, parameters and buffers left out. Works on the meta device, where nothing is computed, so a
large model takes seconds on a laptop.
"""

from __future__ import annotations

import argparse
import copy
import sys

import torch
from torch import nn
from torch.nn import functional as F

import fusedres
from fusedres.runtime.devices import existing_device
from fusedres.traffic.saved import per_image


def image_loss(model: nn.Module, batch: int, px: int, device: torch.device) -> torch.Tensor:
    """Cross entropy of `model` on `batch` channels_last images of 3×`px`×`px`; the values do not matter."""
    images = torch.zeros(batch, 3, px, px, device=device).to(memory_format=torch.channels_last)
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    return F.cross_entropy(model(images), labels)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fusedres.bench.saved_activations", description=__doc__)
    parser.add_argument("--model", default="resnet50", help="a torchvision model (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="smaller of the two batch sizes measured")
    parser.add_argument("--px", type=int, default=224, help="height and width of the images")
    parser.add_argument("--schedule", default="moments", help="schedule of the fused model")
    parser.add_argument("--device", default="meta", help="meta computes nothing and needs no memory")
    options = parser.parse_args(arguments)
    if min(options.batch, options.px) < 1:
        parser.error("--batch and --px must be at least 1")

    import torchvision

    try:
        device = torch.device("meta") if options.device == "meta" else existing_device(options.device, "meta")
        eager = torchvision.models.get_model(options.model)
    except ValueError as error:
        parser.error(str(error))
    eager = eager.to(device).to(memory_format=torch.channels_last).train()
    fused = fusedres.fuse(copy.deepcopy(eager), schedule=options.schedule)

    print(
        f"{options.model}, {options.px} px, training step on {device},"
        f" batches of {options.batch} and {2 * options.batch}"
    )
    print("saved for backward; floating-point activations counted as bf16, the fixed part as the fp32 it is")
    print(f"{'':20}{'MB per image':>14}{'fixed MB':>11}{'MB at batch ' + str(options.batch):>20}")
    for name, model in ("eager", eager), (f"fused ({options.schedule})", fused):
        line = per_image(model, lambda m, n: image_loss(m, n, options.px, device), options.batch)
        slope, fixed = line.slope.as_dtype(torch.bfloat16) / 1e6, line.fixed.total / 1e6
        print(f"{name:20}{slope:14.2f}{fixed:11.2f}{slope * options.batch + fixed:20.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
