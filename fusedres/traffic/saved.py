"""Bytes that autograd keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from fusedres.runtime.torch_private import storage_id
from fusedres.traffic.tensors import tensors_in


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


def saved_bytes(
    model: nn.Module, make_loss: Callable[[nn.Module], torch.Tensor | tuple[torch.Tensor, ...]]
) -> SavedBytes:
    """Run `make_loss(model)` once and sum the storages that autograd keeps for the backward of what it returns.

    Storages are told apart by their StorageImpl, since data_ptr is 0 for every meta tensor, and all of them
    stay referenced until the sum is taken, so that none is freed and its address given to another.
    """
    return saved_by((*model.parameters(), *model.buffers()), lambda: make_loss(model))


def saved_by(
    owned: Iterable[torch.Tensor], forward: Callable[[], torch.Tensor | tuple[torch.Tensor, ...]]
) -> SavedBytes:
    """The same of any ``forward``; what is ``owned`` does not count."""
    seen = {storage_id(tensor) for tensor in owned}
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    saved.extend(_kept_on_contexts(tensors_in(loss)))

    by_dtype: dict[torch.dtype, float] = {}
    for tensor in saved:
        if storage_id(tensor) not in seen:
            seen.add(storage_id(tensor))
            by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + tensor.untyped_storage().nbytes()
    return SavedBytes(by_dtype)


def _kept_on_contexts(losses: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Tensors that custom Functions hold as attributes of their context, which no saved-tensor hook sees."""
    pending = [loss.grad_fn for loss in losses]
    seen = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        pending.extend(edge for edge, _ in node.next_functions)
        yield from tensors_in(getattr(node, "__dict__", {}))


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
