"""Compiled Triton kernels executed on the CPU: what the compiler of a GPU made, thread by thread."""

from fusedres.vgpu.errors import (
    Deadlock,
    Divergence,
    Misaligned,
    NeverWritten,
    NotExecutable,
    OutOfBounds,
    OutOfResources,
    Race,
    Refused,
    Unavailable,
    VgpuError,
)
from fusedres.vgpu.host import why_unavailable
from fusedres.vgpu.run import TARGETS, ArgumentTraffic, Counters, compare_orders, run

__all__ = [
    "TARGETS",
    "ArgumentTraffic",
    "Counters",
    "Deadlock",
    "Divergence",
    "Misaligned",
    "NeverWritten",
    "NotExecutable",
    "OutOfBounds",
    "OutOfResources",
    "Race",
    "Refused",
    "Unavailable",
    "VgpuError",
    "compare_orders",
    "run",
    "why_unavailable",
]
