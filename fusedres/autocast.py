"""Autocast's rules, followed by hand: inside a fused pass every dtype is chosen, not dispatched."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def enabled(device_type: str) -> bool:
    """Whether autocast is on for a device; False for devices that have none (meta)."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def contraction_dtype(x: Tensor) -> torch.dtype:
    """The dtype that eager PyTorch would convolve ``x`` in: autocast's, unless x is fp64, or its own."""
    kind = x.device.type
    if x.dtype != torch.float64 and enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast off, where it is on."""
    return torch.autocast(device_type, enabled=False) if enabled(device_type) else nullcontext()
