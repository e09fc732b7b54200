"""The schedule of a chain, from what the user asked for, the shapes, the dtype and the GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from fusedres.compiler.targets import TARGETS
from fusedres.context import context, here
from fusedres.operands import Layer
from fusedres.patterns.cost import ChainShape, LayerShape, Pass, StemShape, chain_passes, stem_passes, takes_moments
from fusedres.plan.gpus import Gpu
from fusedres.plan.schedule import SCHEDULES, Schedule
from fusedres.runtime.call import Call

AUTO = "auto"
LIBRARY = Schedule("library", bit_masks=False)
"""What `auto` runs where no kernel of ours does: one library call per op, each written once, nothing formed twice."""

# A kernel that does nothing takes a GPU this long, and Python this long to start one.
KERNEL_SECONDS, HOST_SECONDS = 3e-6, 10e-6


@dataclass(frozen=True)
class Estimate:
    """What a training step of a chain or stem takes on one rung.

    Attributes:
        rung: its name.
        seconds: the longer of the GPU's time (each launch the longest of moving, computing and starting) and the
            host's.
        moved: bytes.
        flops: floating-point operations.
        launches: how many.
        bound: by what: ``"memory"``, ``"arithmetic"`` or ``"launches"``.
    """

    rung: str
    seconds: float
    moved: int
    flops: int
    launches: int
    bound: str


@dataclass(frozen=True)
class Choice:
    """The schedule that ``"auto"`` runs, why, and what the others would take."""

    schedule: Schedule
    reason: str
    estimates: tuple[Estimate, ...] = ()


def check_schedule(name: str) -> None:
    """Refuse a name that is neither ``"auto"`` nor a rung of the ladder."""
    if not isinstance(name, str) or (name != AUTO and name not in SCHEDULES):
        raise ValueError(f"schedule: expected one of {[AUTO, *SCHEDULES]}, got {name!r}")


def estimate(rung: str, passes: Iterable[Pass], dtype: torch.dtype, gpu: Gpu, *, tf32: bool) -> Estimate:
    """What ``passes`` take on a GPU."""
    moved = flops = launches = 0
    memory = arithmetic = total = 0.0
    for step in passes:
        moved, flops, launches = moved + step.moved, flops + step.flops, launches + 1
        moving = step.moved / gpu.bandwidth
        computing = step.flops / gpu.rate(dtype, tf32=tf32 and not step.exact)
        memory, arithmetic = memory + moving, arithmetic + computing
        total += max(moving, computing, KERNEL_SECONDS)
    host = launches * HOST_SECONDS
    started = max(host, launches * KERNEL_SECONDS)
    bound = "launches" if max(host, 2 * started) > 2 * total else "memory" if memory >= arithmetic else "arithmetic"
    return Estimate(rung, max(total, host), moved, flops, launches, bound)


@functools.lru_cache(maxsize=4096)
def choose(shape: ChainShape | StemShape, dtype: torch.dtype, gpu: Gpu, *, tf32: bool = False) -> Choice:
    """The rung on which a training step of a chain or stem takes least time on a GPU, as far as bytes, FLOPs and
    launches tell.

    Args:
        shape: of the chain or stem.
        dtype: of its contractions.
        gpu: that runs it.
        tf32: whether fp32 products may be of TF32.

    Returns:
        A `Choice`; of rungs that take equally long the lowest.
    """

    def passes(rung: Schedule) -> Iterator[Pass]:
        if isinstance(shape, StemShape):
            return stem_passes(shape, rung, dtype.itemsize, TARGETS[gpu.target])
        return chain_passes(shape, rung, dtype.itemsize, TARGETS[gpu.target])

    found = tuple(estimate(name, passes(rung), dtype, gpu, tf32=tf32) for name, rung in SCHEDULES.items())
    best = min(found, key=lambda one: (one.seconds, one.moved, one.launches))
    return Choice(SCHEDULES[best.rung], _reason(best, found, gpu), found)


def _reason(best: Estimate, found: Iterable[Estimate], gpu: Gpu) -> str:
    others = [one for one in found if one.moved != best.moved or one.launches != best.launches]
    words = f"{_milliseconds(best)} on {gpu.name}, bound by {best.bound}: {_work(best)}"
    if not others:
        return f"{words}; every rung takes the same"
    second = min(others, key=lambda one: one.seconds)
    return f"{words}; {second.rung} {_milliseconds(second)}: {_work(second)}"


def _milliseconds(one: Estimate) -> str:
    return f"{one.seconds * 1e3:.3g} ms"


def _work(one: Estimate) -> str:
    return f"{one.moved / 1e6:.0f} MB, {one.flops / 1e9:.0f} GFLOP, {one.launches} launches"


def chain_schedule(requested: str, *, kernels: bool) -> Schedule:
    """The schedule that a rung's name stands for, and that of ``"auto"`` where there is nothing to choose from.

    Args:
        requested: a rung or ``"auto"``.
        kernels: whether ops run theirs.
    """
    return SCHEDULES.get(requested, SCHEDULES["prologue"] if kernels else LIBRARY)


def fused_schedule(requested: str, call: Call) -> Schedule:
    """What `auto` is for blocks that begin with a batch norm: on kernels the prologue, fewest bytes and launches."""
    return chain_schedule("prologue" if requested == AUTO and call.kernels else requested, kernels=call.kernels)


def use_moments(requested: str, layer: Layer, call: Call) -> bool:
    """Whether a block's last convolution (or its projection) is never written.

    The moments of C channels cost C / K of the convolution, forward and backward, and spare the K channels of its
    output. For a bottleneck's end, C / K is a quarter; at a half they still spare more memory than they take.

    Args:
        requested: a rung or ``"auto"``.
        layer: the convolution and its batch norm.
        call: what was decided at the door.
    """
    (k, c), geometry = layer.weight.shape[:2], layer.geometry
    padded = geometry.padding != (0, 0)
    shape = LayerShape(0, 0, 0, c * geometry.groups, k, geometry.groups, layer.window, padded=padded)
    if requested == AUTO:
        by_library = call.device == "cpu" and not call.kernels and call.dtype == torch.float32
        return shape.pointwise and by_library and 4 * c <= k and c <= AUTO_MOMENTS_CHANNELS
    return SCHEDULES[requested].moments and takes_moments(shape)


AUTO_MOMENTS_CHANNELS = 64


def listening(listener: Callable[[Choice], None]) -> AbstractContextManager[None]:
    """Tell ``listener`` of every choice that is made for a call inside the ``with`` block."""
    return context(listeners=(*here().listeners, listener))


def announce(choice: Choice) -> None:
    """Tell whoever listens."""
    for listener in here().listeners:
        listener(choice)
