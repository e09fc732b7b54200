"""Autocast's rules, followed by hand: inside a fused pass every dtype is chosen, not dispatched."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fusedres.context import context, here


def enabled(device_type: str) -> bool:
    """Whether autocast is on for a device; for meta, inside of `on_meta`."""
    if device_type == "meta":
        return here().meta_dtype is not None
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def contraction_dtype(x: Tensor) -> torch.dtype:
    """The dtype that eager PyTorch would convolve ``x`` in: autocast's, unless x is fp64, or its own."""
    kind = x.device.type
    if x.dtype == torch.float64 or not enabled(kind):
        return x.dtype
    chosen = here().meta_dtype if kind == "meta" else None
    return chosen or torch.get_autocast_dtype(kind)


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast off, where it is on."""
    if not enabled(device_type):
        return nullcontext()
    return on_meta(None) if device_type == "meta" else torch.autocast(device_type, enabled=False)


def on_meta(dtype: torch.dtype | None) -> AbstractContextManager[None]:
    """Fused passes on meta tensors convolve in ``dtype`` inside the ``with`` block, as under autocast; None: off.

    PyTorch has no autocast for tensors of the meta device, on which dry runs are made.
    """
    return context(meta_dtype=dtype)
