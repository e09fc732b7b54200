"""What a training step needs in memory, for the message when it does not fit."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from fusedres.traffic.saved import per_image
from fusedres.traffic.tensors import first_tensor

if sys.platform != "win32":
    import resource

__all__ = ["DoesNotFit", "available", "explanation", "is_out_of_memory", "peak"]

MEASURED_BATCH = 2


class DoesNotFit(RuntimeError):
    """The batch needs more memory than there is; the message says how much."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is an allocation that failed, on a GPU or on the CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def peak(device: torch.device) -> int:
    """Most bytes in use so far: by tensors on a GPU, by the process on the CPU; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available(device: torch.device) -> int:
    """All bytes of the device; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if sys.platform == "win32":
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def explanation(
    build: Callable[[], nn.Module],
    shape: tuple[int, int, int],
    batch: int,
    device: torch.device,
    *,
    amp: torch.dtype | None,
) -> str:
    """In words: what the parameters and a batch are estimated to need, what there is, and the batch that would fit.

    Args:
        build: makes the network; called under the meta device.
        shape: (C, H, W) of an image.
        batch: images per device.
        device: where it did not fit.
        amp: dtype in which activations are kept; None as they are.
    """
    meta = torch.device("meta")
    with meta:
        model = build().to(memory_format=torch.channels_last).train()

    def loss(network: nn.Module, count: int) -> torch.Tensor:
        images = torch.zeros(count, *shape, device=meta).contiguous(memory_format=torch.channels_last)
        return F.cross_entropy(first_tensor(network(images)), torch.zeros(count, dtype=torch.long, device=meta))

    line = per_image(model, loss, MEASURED_BATCH)
    each = line.slope.as_dtype(amp) if amp is not None else line.slope.total
    # Parameters, their gradients and the optimiser's momentum.
    fixed = line.fixed.total + 3 * sum(parameter.nbytes for parameter in model.parameters())
    limit = available(device)
    fits = max(0, int((limit - fixed) / each))
    return (
        f"a batch of {batch} images does not fit into the memory of {device}: estimated {_amount(each * batch)} saved"
        f" for backward ({_amount(each)} per image) and {_amount(fixed)} of weights, gradients and momentum;"
        f" {device} has {_amount(limit)}, of which other tensors need a part, so try a batch well below {fits}"
        " (fusedres explain shows where the bytes go)"
    )


def _amount(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
