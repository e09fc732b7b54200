"""How long a launch takes on a GPU, predicted from its compiled code: a model, calibrated on published speeds.

A launch takes as long as the slowest of what it keeps busy on the multiprocessor that has most blocks: memory, the L2
cache, tensor cores, the issue of instructions, the busiest pipe, shared memory. And it takes no less than its waves of
blocks, each waiting for what it loads. These overlap, but not perfectly, and a p-norm joins them. Of a library's call
bytes and FLOPs alone are known, and the shares of a data sheet's figures that such calls reach.

Three sets of `Assumptions` make a band. They were fitted (tests/plan/test_time.py) to published speeds of products of
matrices and convolutions by Triton and of eager training; nothing here has been measured by this project. What a user
has measured of a GPU (`plan.calibrate`) its `Gpu` holds, and it stands in place of these constants.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from fusedres.compiler.code import Code, Segment
from fusedres.compiler.occupancy import occupancy
from fusedres.compiler.targets import TARGETS
from fusedres.plan.constants import BOUNDS
from fusedres.plan.gpus import Gpu
from fusedres.plan.shapes import wide

SCHEDULERS = 4
SHARED_PER_CYCLE = 128
# Bytes that a multiprocessor gets from the L2 cache in a cycle: 4.8 TB/s of an A100, 8.0 of an H100. Others' are taken
# to be of the same order.
L2_PER_CYCLE, OTHERS_L2_PER_CYCLE = {80: 31.5, 90: 33.1}, 32.0


@dataclass(frozen=True)
class Assumptions:
    """What a prediction rests on, beside data sheets.

    Attributes:
        overlap: p of the norm that joins what is busy at once; infinity is perfect overlap.
        contractions, rows: shares of a data sheet's bandwidth that contractions and passes over rows reach.
        start: cycles that a block takes to begin and to end.
        latency: cycles of a load from memory.
        gap: seconds between two launches.
        issue: instructions per cycle of a scheduler with 1, 2, 3 and more warps.
        clock: share of the data sheet's clock that is held.
        synchronous: share of their rate that mma.sync reaches on tensor cores that can read shared memory themselves.
        library: how far a library's calls are from the usual, a factor of their speed.
        tensor_cores: share of their rate by the data sheet, at the clock that is held, that tensor cores reach.
        l2: factor of what a multiprocessor is taken to get from the L2 cache.
    """

    overlap: float
    contractions: float
    rows: float
    start: float
    latency: float
    gap: float
    issue: tuple[float, float, float, float]
    clock: float
    synchronous: float
    library: float
    tensor_cores: float = 1.0
    l2: float = 1.0


OPTIMISTIC = Assumptions(50, 0.88, 0.92, 350, 520, 1.0e-6, (0.48, 0.68, 0.78, 0.84), 0.98, 0.70, 1.13)
CENTRAL = Assumptions(5, 0.82, 0.87, 500, 620, 1.5e-6, (0.42, 0.60, 0.70, 0.76), 0.95, 0.63, 1.0)
PESSIMISTIC = Assumptions(2.5, 0.76, 0.82, 700, 750, 2.0e-6, (0.36, 0.52, 0.62, 0.68), 0.88, 0.57, 0.88)
BAND = (OPTIMISTIC, CENTRAL, PESSIMISTIC)


class Work(NamedTuple):
    """A launch: what its binary asks for, and how much of it runs.

    Attributes:
        blocks: of the grid.
        warps, registers, shared, stages: of a block, of a thread, bytes of a block, of the pipelined loop.
        code: of a warp.
        steps: how often each loop runs.
        moved: bytes, each counted once.
        contracts: whether it multiplies matrices.
    """

    blocks: int
    warps: int
    registers: int
    shared: int
    stages: int
    code: Code
    steps: tuple[float, ...]
    moved: int
    contracts: bool


# What a launch may be bound by, as `_terms` has it.
BOUND_BY = ("memory", "latency", "issue", "pipe", "tensor cores", "shared memory", "L2 cache")
GAP = "gap between launches"


def launch_seconds(work: Work, gpu: Gpu, given: Assumptions = CENTRAL) -> float:
    """Seconds of a launch of a kernel."""
    given = assumed(given, gpu)
    return _norm(_terms(work, gpu, given), given.overlap) + given.gap


def bound_by(work: Work, gpu: Gpu) -> str:
    """What a launch waits for longest, of `BOUND_BY` or `GAP`."""
    given = assumed(CENTRAL, gpu)
    terms = _terms(work, gpu, given)
    longest = max(terms)
    return BOUND_BY[terms.index(longest)] if longest > given.gap else GAP


def _terms(work: Work, gpu: Gpu, given: Assumptions) -> list[float]:
    """Seconds that each of `BOUND_BY` takes."""
    reached = given.contractions if work.contracts else given.rows
    cycle = 1e-9 / (gpu.ghz * given.clock)
    side_by_side = occupancy(work.warps, work.registers, work.shared, gpu.target).blocks
    fullest = -(-work.blocks // gpu.multiprocessors)
    waves = -(-fullest // side_by_side)
    counts = _counts(work)
    terms = [work.moved / (reached * gpu.tb_per_s * 1e12), waves * _block_cycles(work, counts, gpu, given) * cycle]
    return terms + [fullest * each * cycle for each in _busy(work, counts, gpu, given, min(side_by_side, fullest))]


# Names of constants (`plan.constants.BOUNDS`) of `Library` begin so; others are of `Assumptions`.
OF_LIBRARY = "library."
_SHARES = ("contractions", "rows", "synchronous", "tensor_cores")


def assumed(given: Assumptions, gpu: Gpu) -> Assumptions:
    """``given``, as far from what was measured of a GPU as it is from the central assumptions."""
    return _moved(given, gpu) if gpu.measured else given


@functools.lru_cache(maxsize=64)
def _moved(given: Assumptions, gpu: Gpu) -> Assumptions:
    changed: dict[str, float | tuple[float, ...]] = {}
    for name, value in gpu.measured.items():
        if name.startswith(OF_LIBRARY):
            continue
        mine, central = getattr(given, name), getattr(CENTRAL, name)
        if name == "issue":
            changed[name] = tuple(min(1.0, one * value / central[-1]) for one in mine)
        else:
            own = mine * value / central
            changed[name] = min(1.0, own) if name in _SHARES else own
    return replace(given, **changed) if changed else given  # type: ignore[arg-type]


def constants_of(gpu: Gpu) -> dict[str, float]:
    """Every constant that measuring can correct, as predictions for a GPU have it; of ``issue`` the highest rate."""
    given, library = assumed(CENTRAL, gpu), library_of(gpu)
    own = {field.name: getattr(given, field.name) for field in fields(Assumptions)}
    own["issue"] = given.issue[-1]
    own |= {f"{OF_LIBRARY}{name}": value for name, value in library._asdict().items()}
    return {name: own[name] for name in BOUNDS}


def waves_of(work: Work, gpu: Gpu) -> float:
    """How often the multiprocessors fill with blocks."""
    side_by_side = occupancy(work.warps, work.registers, work.shared, gpu.target).blocks
    return work.blocks / (side_by_side * gpu.multiprocessors)


def _counts(work: Work) -> list[tuple[Segment, float]]:
    """Every segment with how often a block runs it."""
    loops, steps = work.code.loops, work.steps
    if len(loops) == len(steps) + 1:
        steps = _unrolled(loops, steps)
    if len(steps) != len(loops):
        # Compilers merge loops, unroll and split them. The steps that are most are those of the loops that do most.
        heaviest = sorted(range(len(loops)), key=lambda i: (-loops[i].multiply_adds, -loops[i].instructions))
        kept = sorted(sorted(range(len(steps)), key=lambda i: -steps[i])[: len(loops)])
        told = dict(zip(sorted(heaviest[: len(kept)]), (steps[i] for i in kept), strict=True))
        steps = tuple(told.get(i, 1.0) for i in range(len(loops)))
    return [(work.code.straight, 1.0), *zip(loops, steps, strict=True)]


def _unrolled(loops: Sequence[Segment], steps: Sequence[float]) -> tuple[float, ...]:
    """Steps where a loop has been taken apart: several of its steps at once, and then the rest one by one."""
    for i in range(len(steps)):
        at_once, rest = divmod(loops[i].moved, loops[i + 1].moved or loops[i].moved + 1)
        if at_once > 1 and not rest:
            return (*steps[:i], steps[i] // at_once, steps[i] % at_once, *steps[i + 1 :])
    return tuple(steps)


def _busy(
    work: Work, counts: Sequence[tuple[Segment, float]], gpu: Gpu, given: Assumptions, together: int
) -> list[float]:
    """Cycles that a block keeps a multiprocessor's parts busy: issue, pipe, tensor cores, shared memory, L2."""
    instructions, busiest, multiply_adds, synchronous, shared, moved = (
        sum(count * segment[i] for segment, count in counts) for i in range(6)
    )
    per_scheduler = work.warps / SCHEDULERS
    if wide(TARGETS[gpu.target]):
        multiply_adds += synchronous * (1 / given.synchronous - 1)
    arch = TARGETS[gpu.target].arch
    l2 = L2_PER_CYCLE.get(arch, OTHERS_L2_PER_CYCLE) if isinstance(arch, int) else OTHERS_L2_PER_CYCLE
    return [
        instructions * per_scheduler / _issued(given, per_scheduler * together),
        busiest * per_scheduler,
        multiply_adds * work.warps / (given.tensor_cores * gpu.multiply_adds),
        shared * work.warps / SHARED_PER_CYCLE,
        moved * work.warps / (given.l2 * l2),
    ]


def _issued(given: Assumptions, warps: float) -> float:
    """Instructions per cycle of a scheduler with so many warps."""
    return given.issue[min(max(math.ceil(warps), 1), len(given.issue)) - 1] * min(warps, 1)


def _block_cycles(work: Work, counts: Sequence[tuple[Segment, float]], gpu: Gpu, given: Assumptions) -> float:
    """Cycles of one block with a multiprocessor to itself."""
    per_scheduler = max(1.0, work.warps / SCHEDULERS)
    rate = _issued(given, per_scheduler)
    cycles = given.start
    for place, (segment, count) in enumerate(counts):
        issue = segment.instructions * per_scheduler / rate
        multiply = segment.multiply_adds * work.warps / (given.tensor_cores * gpu.multiply_adds)
        # What a pipeline of so many stages leaves of a load's latency; before it is filled nothing is hidden.
        arriving = given.latency / max(1, work.stages - 1) if segment.copied and place else 0.0
        cycles += count * (max(issue, multiply, arriving) + given.latency * segment.waits)
    return cycles


def _norm(terms: Sequence[float], p: float) -> float:
    longest = max(terms)
    return longest * sum((term / longest) ** p for term in terms) ** (1 / p) if longest else 0.0


class Library(NamedTuple):
    """Shares of a data sheet's figures that a library's calls reach.

    Attributes:
        products: of tensor cores, by convolutions and products.
        bandwidth: by these.
        weight_gradient: share of the two that weight gradients reach.
        rows, statistics: of bandwidth, by passes over rows that write as much as they read, and by reductions.
    """

    products: float
    bandwidth: float
    weight_gradient: float = 0.9
    rows: float = 0.82
    statistics: float = 0.77


# Before sm_90 and from it on. AMD's are not known, and taken for those of sm_90.
AMPERE, HOPPER = Library(0.64, 0.71), Library(0.47, 0.69)


def library_of(gpu: Gpu) -> Library:
    """What is known of the library on an architecture, or was measured on a GPU."""
    arch = TARGETS[gpu.target].arch
    usual = AMPERE if isinstance(arch, int) and arch < 90 else HOPPER
    measured = {name.removeprefix(OF_LIBRARY): value for name, value in gpu.measured.items() if OF_LIBRARY in name}
    return usual._replace(**measured) if measured else usual


class LibraryCall(NamedTuple):
    """A kernel of a library's: its kind of `traffic.aten.KINDS`, bytes, FLOPs, and FLOP/s by the data sheet."""

    kind: str
    read: int
    written: int
    flops: int
    rate: float


Timed = Work | tuple[LibraryCall, ...]
"""What a time is predicted of: a launch of ours, or the kernels of one call into a library."""


def seconds_of(work: Timed, gpu: Gpu, given: Assumptions = CENTRAL) -> float:
    """Seconds of a launch or of a call."""
    if isinstance(work, Work):
        return launch_seconds(work, gpu, given)
    return sum(library_seconds(*call, gpu, given) for call in work)


def library_seconds(
    kind: str, read: int, written: int, flops: int, rate: float, gpu: Gpu, given: Assumptions = CENTRAL
) -> float:
    """Seconds of a library's call.

    Args:
        kind: of work, of `traffic.aten.KINDS`.
        read, written: bytes, each counted once.
        flops: floating-point operations of products.
        rate: floating-point operations per second of its dtype, by the data sheet.
        gpu: that runs it.
        given: what is assumed.
    """
    given, library = assumed(given, gpu), library_of(gpu)
    bandwidth = gpu.tb_per_s * 1e12
    if flops:
        reached = given.library * (library.weight_gradient if kind == "weight gradient" else 1.0)
        terms = [
            flops / (library.products * rate * reached),
            (read + written) / (library.bandwidth * bandwidth * reached),
        ]
        return _norm(terms, given.overlap) + given.gap
    share = library.rows if written > read // 8 else library.statistics
    return (read + written) / (min(0.95, share * given.library) * bandwidth) + given.gap


def library_bound_by(call: LibraryCall, gpu: Gpu) -> str:
    """What a library's call waits for longest, of `BOUND_BY` or `GAP`."""
    gap, library = assumed(CENTRAL, gpu).gap, library_of(gpu)
    moving = (call.read + call.written) / (library.bandwidth * gpu.tb_per_s * 1e12)
    multiplying = call.flops / (library.products * call.rate)
    if max(moving, multiplying) < gap:
        return GAP
    return "memory" if moving >= multiplying else "tensor cores"
