"""Compiled Triton kernels executed on the CPU: what the compiler of a GPU made, thread by thread."""

from .errors import (
    Divergence,
    Misaligned,
    NeverWritten,
    NotExecutable,
    OutOfBounds,
    OutOfResources,
    Race,
    Unavailable,
    VgpuError,
)
from .host import why_unavailable
from .run import TARGETS, ArgumentTraffic, Counters, compare_orders, run

__all__ = [
    "TARGETS",
    "ArgumentTraffic",
    "Counters",
    "Divergence",
    "Misaligned",
    "NeverWritten",
    "NotExecutable",
    "OutOfBounds",
    "OutOfResources",
    "Race",
    "Unavailable",
    "VgpuError",
    "compare_orders",
    "run",
    "why_unavailable",
]
