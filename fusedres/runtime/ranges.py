"""Names in a profiler's timeline: each pass under the name of its block and its schedule, forward and backward.

Off unless somebody asks, by `profile` or by ``FUSEDRES_PROFILE=1``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from fusedres.context import context, here
from fusedres.runtime import fallback, switches

NOTHING: AbstractContextManager[None] = nullcontext()


def wanted() -> bool:
    """Whether passes on this thread are named."""
    return switches.PROFILE or here().profiled is not None


@contextmanager
def profile() -> Iterator[None]:
    """Name fused passes in profilers' timelines, for what this thread runs inside the ``with`` block.

    Each pass, forward and backward, is a range called by its block and its schedule, such as ``layer1.0 stats``: of
    `torch.profiler`, and of NVTX (Nsight) where there is a GPU. ``FUSEDRES_PROFILE=1`` does so everywhere.
    """
    with context(profiled=""):
        yield


def named(schedule: str) -> AbstractContextManager[object]:
    """The range of a pass that runs on a schedule, for the module whose pass it is."""
    if not wanted():
        return NOTHING
    owner: Any = fallback.owner()
    name = "a pass" if owner is None else owner.fused_name or type(owner).__name__
    name = f"{name} {schedule}"
    stack = ExitStack()
    stack.enter_context(_range(name))
    stack.enter_context(context(profiled=name))
    return stack


def forward_name() -> str:
    """What the pass under way is called, to be remembered for its backward pass; empty: it has no name."""
    return here().profiled or ""


def backward(name: str) -> AbstractContextManager[None]:
    """The range of a pass's backward pass."""
    return _range(f"{name} backward") if name else NOTHING


@contextmanager
def _range(name: str) -> Iterator[None]:
    nvtx = torch.cuda.is_available()
    if nvtx:
        torch.cuda.nvtx.range_push(name)
    try:
        with torch.profiler.record_function(name):
            yield
    finally:
        if nvtx:
            torch.cuda.nvtx.range_pop()
