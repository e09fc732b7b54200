"""One process among those that torchrun starts, or alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn

from fusedres.runtime.devices import default_device, existing_device, gpus, made_current

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
        device: "cpu", "cuda" or "cuda:<index>"; None takes the GPU if there is one. Of several processes on GPUs each
            has its own, which is the current one inside.

    Raises:
        ValueError: the device is unknown or absent, or there are more processes than GPUs.
    """
    chosen = existing_device(default_device() if device is None else device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and chosen.type == "cuda":
        chosen = _of_this_process(chosen)
    with made_current(chosen):
        if size == 1:
            yield World(0, 1, chosen)
            return
        distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        try:
            yield World(distributed.get_rank(), size, chosen)
        finally:
            distributed.destroy_process_group()


def _of_this_process(chosen: torch.device) -> torch.device:
    """One GPU for each of the processes on this machine."""
    if chosen != torch.device("cuda"):
        raise ValueError(f"device: expected cuda, of which each of torchrun's processes takes one, got {str(chosen)!r}")
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    # torchrun tells every process how many there are, so that all of them refuse and none waits for the others.
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(rank + 1)))
    found = gpus()
    if local > len(found):
        raise ValueError(
            f"nproc-per-node: expected at most {len(found)} on the GPUs of this machine ({', '.join(found)}),"
            f" got {local}"
        )
    return torch.device("cuda", rank)
