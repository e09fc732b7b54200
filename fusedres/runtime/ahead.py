"""What a first step would compile one binary after the other is compiled in parallel before it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from fusedres.cache import say_once
from fusedres.compiler.ahead import compile_ahead, cores, missing_of
from fusedres.compiler.binary import Binary
from fusedres.compiler.targets import TARGETS, triton
from fusedres.runtime import switches
from fusedres.runtime.launch import look_into_folders, target_name
from fusedres.runtime.plans import locked

# Fewer are compiled sooner than processes start.
LEAST = 4

_looked_for: set[tuple[Binary, str]] = set()


def is_wanted(device: torch.device) -> bool:
    """Whether what a device is to launch for the first time is compiled before, in processes of its own."""
    if device.type != "cuda" or not switches.PARALLEL_COMPILE or triton is None:
        return False
    look_into_folders(device.index)
    return target_name(device.index) in TARGETS and cores() > 1


def compile_missing(binaries: Iterable[Binary], target: str) -> None:
    """Compile what Triton's cache does not hold, where that is worth processes.

    Processes that share a cache, as the ranks of a machine do, wait for the first of them, which compiles for all. What
    can not be compiled is left for the launch to say; of another failure there is a warning.
    """
    fresh = [binary for binary in dict.fromkeys(binaries) if (binary, target) not in _looked_for]
    _looked_for.update((binary, target) for binary in fresh)
    try:
        missing = missing_of(fresh, target)
        if len(missing) >= LEAST:
            with locked(Path(triton.knobs.cache.dir) / "fusedres"):
                compile_ahead(missing, target)
    except Exception as error:
        say_once(f"binaries are compiled one after the other ({type(error).__name__}: {error})")
