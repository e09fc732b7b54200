"""For tests that run on the GPUs of a machine that has some."""

import pytest
import torch

from fusedres.runtime.devices import gpus

needs_gpu = pytest.mark.skipif(not gpus(), reason="PyTorch sees no GPU here")


def allocations() -> dict[str, int]:
    """How often memory was asked for so far, by GPU."""
    return {name: torch.cuda.memory_stats(name).get("allocation.all.allocated", 0) for name in gpus()}


def used_since(before: dict[str, int]) -> list[str]:
    """The GPUs on which memory was asked for since then."""
    return [name for name, count in allocations().items() if count != before[name]]
