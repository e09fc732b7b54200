"""One process among those that torchrun starts, or alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn

__all__ = ["World", "world"]


@dataclass(frozen=True)
class World:
    """This process: its rank among ``size``, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def wrap(self, model: nn.Module, *, unused: bool = False) -> nn.Module:
        """``model`` with gradients averaged over all ranks; itself if there is one rank."""
        if self.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, find_unused_parameters=unused)

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` (D,) of every rank: (size, D)."""
        if self.size == 1:
            return values[None]
        rows = [torch.empty_like(values) for _ in range(self.size)]
        distributed.all_gather(rows, values)
        return torch.stack(rows)

    def objects(self, value: Any) -> list[Any]:
        """``value`` of every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """Give all ranks the running statistics of rank 0, which are those that are saved."""
        if self.size > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, 0)

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            distributed.barrier()


@contextmanager
def world(device: str | None) -> Iterator[World]:
    """Join the processes that torchrun started, if it did.

    Args:
        device: "cpu", "cuda" or the like; None takes the GPU if there is one.

    Raises:
        ValueError: the device is unknown or absent.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {name!r}") from error
    if chosen.type not in ("cpu", "cuda") or (chosen.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device: {name!r} is not available here; expected cpu or, with a GPU, cuda")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, chosen)
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield World(distributed.get_rank(), size, chosen)
    finally:
        distributed.destroy_process_group()
