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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, is_dataclass

import torch
from torch import nn
from torch.nn import functional as F

import fusedres
from fusedres.devices import existing_device

__all__ = ["PerImage", "SavedBytes", "per_image", "saved_bytes"]


@dataclass(frozen=True)
class SavedBytes:
    """Bytes saved for backward, by dtype of the tensor that was saved."""

    by_dtype: dict[torch.dtype, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.by_dtype.values())

    def as_dtype(self, dtype: torch.dtype) -> float:
        """Bytes if every floating-point element had `dtype`; integers and masks keep their own size."""
        return sum(
            nbytes * dtype.itemsize / saved.itemsize if saved.is_floating_point else nbytes
            for saved, nbytes in self.by_dtype.items()
        )


@dataclass(frozen=True)
class PerImage:
    """Saved bytes as a straight line over the batch size: `slope` bytes per image plus a `fixed` part.

    The fixed part (per-channel vectors, C×C and K×C matrices) does not grow with the batch and is fp32 in
    every storage dtype, so only the slope may be converted to bf16.
    """

    slope: SavedBytes
    fixed: SavedBytes


def saved_bytes(model: nn.Module, make_loss: Callable[[nn.Module], torch.Tensor]) -> SavedBytes:
    """Run `make_loss(model)` once and sum the storages that autograd keeps for its backward.

    Storages are told apart by their StorageImpl, since data_ptr is 0 for every meta tensor, and all of them
    stay referenced until the sum is taken, so that none is freed and its address given to another.
    """
    owned = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = make_loss(model)
    saved.extend(_kept_on_contexts(loss))

    by_dtype: dict[torch.dtype, float] = {}
    seen = set(owned)
    for tensor in saved:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + storage.nbytes()
    return SavedBytes(by_dtype)


def _kept_on_contexts(loss: torch.Tensor) -> Iterator[torch.Tensor]:
    """Tensors that custom Functions hold as attributes of their context, which no saved-tensor hook sees."""
    pending = [loss.grad_fn]
    seen = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        pending.extend(edge for edge, _ in node.next_functions)
        yield from _tensors_in(getattr(node, "__dict__", {}))


def _tensors_in(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _tensors_in(vars(value))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)


def per_image(model: nn.Module, make_loss: Callable[[nn.Module, int], torch.Tensor], batch: int) -> PerImage:
    """Measure at `batch` and at twice `batch` images and return slope and intercept.

    Raises:
        ValueError: `batch` is below 1.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    once = saved_bytes(model, lambda m: make_loss(m, batch)).by_dtype
    twice = saved_bytes(model, lambda m: make_loss(m, 2 * batch)).by_dtype
    slope = {dtype: (twice[dtype] - once.get(dtype, 0)) / batch for dtype in twice}
    fixed = {dtype: once.get(dtype, 0) - slope[dtype] * batch for dtype in twice}
    return PerImage(SavedBytes(slope), SavedBytes(fixed))


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
