"""Devices as commands are told of them: by names, which are held against what is here before any work."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["default_device", "existing_device", "gpus", "made_current"]


def gpus() -> list[str]:
    """The names of the GPUs that PyTorch sees and can use."""
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def default_device() -> str:
    """A GPU if there is one, else the CPU."""
    return "cuda" if gpus() else "cpu"


def existing_device(name: str, *others: str) -> torch.device:
    """The device called ``name``: ``cpu``, or where there are GPUs ``cuda`` (the current one) or ``cuda:<index>``.

    Args:
        name: of the device.
        others: what the caller takes besides, to be named in the message.

    Raises:
        ValueError: this machine has no such device; the message says which it has.
    """
    found = gpus()
    here = ("cpu", "cuda", *found) if found else ("cpu",)
    if name not in here:
        why = "" if found else " (PyTorch sees no GPU here)"
        raise ValueError(f"device: expected {', '.join((*here, *others))}{why}, got {name!r}")
    return torch.device(name)


def made_current(device: torch.device) -> AbstractContextManager[object]:
    """Inside of it, what is told of no device takes ``device``: page-locked memory, captures, others' extensions."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
