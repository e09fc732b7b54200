"""Run a Triton kernel on CPU tensors, as its target's compiler made it."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, SupportsInt

import numpy
import torch
from torch import Tensor

from fusedres.compiler.binary import Specialisation, compile_for, scratch_bytes, specialise
from fusedres.compiler.targets import target_named, triton
from fusedres.vgpu import errors, host
from fusedres.vgpu.amd import AMD
from fusedres.vgpu.ir import SLOT, Rewriter
from fusedres.vgpu.nvidia import NVIDIA

DIALECTS = {"sm_80": NVIDIA, "sm_90": NVIDIA, "gfx1100": AMD}
TARGETS = tuple(DIALECTS)
# Where the compiler keeps what a launch needs but nobody passes, such as tensor maps, for each block.
SCRATCH, SCRATCH_ALIGN = "scratch memory of the compiler", 128
MAX_THREADS = 1024  # of a block, on every target; the runtime has room for no more


@dataclass
class ArgumentTraffic:
    """What one launch did to one argument in global memory.

    ``bytes_read`` and ``bytes_written`` count each byte once, however often it was touched. ``sectors`` are the
    32-byte pieces that the accesses of warps touched, ``ideal_sectors`` the fewest that could hold the same bytes.
    """

    bytes_read: int = 0
    bytes_written: int = 0
    sectors: int = 0
    ideal_sectors: int = 0


@dataclass
class Counters:
    """What one launch did. Accesses to shared memory are served in passes; more than ideal are bank conflicts."""

    arguments: dict[str, ArgumentTraffic] = field(default_factory=dict)
    shared_passes: int = 0
    ideal_shared_passes: int = 0
    tensor_ops: int = 0
    tensor_macs: int = 0
    barriers: int = 0

    @property
    def bytes_read(self) -> int:
        return sum(traffic.bytes_read for traffic in self.arguments.values())

    @property
    def bytes_written(self) -> int:
        return sum(traffic.bytes_written for traffic in self.arguments.values())

    @property
    def bank_conflicts(self) -> int:
        return self.shared_passes - self.ideal_shared_passes


class _Region(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("readers", ctypes.c_void_p),
        ("writers", ctypes.c_void_p),
        ("fresh", ctypes.c_int32),
    )


class _Traffic(ctypes.Structure):
    _fields_ = (("sectors", ctypes.c_int64), ("ideal_sectors", ctypes.c_int64))


class _Total(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in ("shared_passes", "ideal_shared_passes", "tensor_ops", "tensor_macs", "barriers")
    )


class _Failure(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "site", "block", "thread", "other")),
        ("address", ctypes.c_int64),
        ("text", ctypes.c_char * 160),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        ("grid", ctypes.c_int32 * 3),
        *((name, ctypes.c_int32) for name in ("threads", "warp_size", "order", "shared_bytes", "workers", "counted")),
        ("region_count", ctypes.c_int32),
        ("regions", ctypes.POINTER(_Region)),
        ("traffic", ctypes.POINTER(_Traffic)),
        ("total", _Total),
        ("failure", _Failure),
        ("private", ctypes.c_char * 256),  # the runtime's own: next block, flags, lock
    )


def run(
    kernel: Any,
    grid: Sequence[int],
    *args: Any,
    target: str = "sm_90",
    num_warps: int = 4,
    num_stages: int = 3,
    warp_order: int = 0,
    uninitialised: Sequence[str] = (),
    count: bool = True,
    workers: int | None = None,
    **constexprs: Any,
) -> Counters:
    """Compile ``kernel`` for ``target`` and execute what the compiler made on CPU tensors, in place.

    Every access is checked against the bounds of the arguments, byte by byte, and so is the order between warps
    that share memory and between blocks that touch the same bytes.

    Args:
        kernel: a ``@triton.jit`` function.
        grid: one to three numbers of blocks.
        *args: the kernel's arguments in order, as a launch on a GPU takes them; keywords work too.
        target: ``"sm_80"``, ``"sm_90"`` or ``"gfx1100"``.
        num_warps, num_stages: as in a launch.
        warp_order: in which order warps run between barriers. 0: first to last, 1: last to first (blocks too),
            others: shuffled with this seed.
        uninitialised: names of tensors that hold nothing yet: they are poisoned, and reading a byte of them that
            this launch has not written is an error.
        count: whether to count traffic, and to look for races between blocks in all tensors. Without it races are
            found in the uninitialised ones only.
        workers: threads of the host that run blocks side by side; all cores by default.
        **constexprs: the kernel's compile-time arguments.

    Returns:
        What the launch did, in numbers; all of them 0 if it was not to be counted.

    Raises:
        Unavailable: this machine lacks a compiler, llvmlite or a known Triton.
        ValueError, TypeError: the target is not executed here, or the arguments are not the kernel's.
        VgpuError: what the kernel did wrong: `OutOfBounds`, `Misaligned`, `NeverWritten`, `Race`, `Divergence`,
            `Deadlock`, `Refused`; `OutOfResources` if the target can not hold a block, `NotExecutable` if the kernel
            uses an operation that is not known here. The tensors are then as they were before.
    """
    if target not in DIALECTS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}")
    host.require()
    if not isinstance(kernel, triton.JITFunction):
        raise TypeError(f"kernel: expected a function of triton.jit, got {kernel!r}")
    if not isinstance(num_warps, int) or num_warps < 1 or num_warps & (num_warps - 1):
        raise ValueError(f"num_warps: expected a power of two, got {num_warps!r}")
    arguments = _bound(kernel, args, constexprs)
    grid = _checked_grid(grid)
    specialisation = specialise(kernel, arguments)
    executable = _executable(kernel, specialisation, target, num_warps, num_stages)
    passed = [name for name, type_ in specialisation.signature if type_ != "constexpr"]
    present = {name: arguments[name] for name in passed}
    if executable.scratch_bytes:
        present[SCRATCH] = torch.empty(math.prod(grid) * executable.scratch_bytes + SCRATCH_ALIGN, dtype=torch.uint8)
        uninitialised = [*uninitialised, SCRATCH]
    with _Memory(present, uninitialised, count) as memory:
        values = [memory.address(name) if isinstance(value, Tensor) else value for name, value in present.items()]
        if executable.scratch_bytes:
            values[-1] += -values[-1] % SCRATCH_ALIGN
        launch, keep = executable.launch(grid, values, num_warps, warp_order, workers or os.cpu_count() or 1)
        launch.regions, launch.region_count, launch.counted = memory.table, len(memory.regions), int(count)
        traffic = (_Traffic * (len(memory.regions) + 1))()
        launch.traffic = ctypes.cast(traffic, ctypes.POINTER(_Traffic))
        if host.runtime().vgpu_run(ctypes.byref(launch)):
            raise _error(kernel.__name__, launch.failure, executable, memory)
        del keep
        memory.copy_back()
        return _counters(launch, memory, traffic) if count else Counters()


def _bound(kernel: Any, args: Sequence[Any], keywords: dict[str, Any]) -> dict[str, Any]:
    bound = kernel.signature.bind(*args, **keywords)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.device.type != "cpu":
            raise ValueError(f"{kernel.__name__}: {name}: expected a CPU tensor, got one on {value.device}")
    return arguments


def _checked_grid(grid: Sequence[int]) -> tuple[int, int, int]:
    if not isinstance(grid, Sequence) or not all(isinstance(size, SupportsInt) for size in grid):
        raise TypeError(f"grid: expected one to three numbers of blocks, such as (4,), got {grid!r}")
    if not 1 <= len(grid) <= 3 or any(int(size) != size or size < 1 for size in grid):
        raise ValueError(f"grid: expected one to three positive numbers, got {tuple(grid)}")
    x, y, z = (*(int(size) for size in grid), 1, 1)[:3]
    return x, y, z


def _slot(type_: str, value: float) -> bytes:
    """An argument as the entry point unpacks it."""
    if type_ == "float":
        return struct.pack("<f", value).ljust(SLOT, b"\0")
    return int(value).to_bytes(SLOT, "little", signed=value < 0)


class _Executable(NamedTuple):
    """A kernel for one target as code of the host."""

    code: host.HostKernel
    shared_bytes: int
    warp_size: int
    scratch_bytes: int  # of global memory, per block

    def launch(
        self, grid: tuple[int, int, int], values: Sequence[Any], num_warps: int, order: int, workers: int
    ) -> tuple[_Launch, Any]:
        types = self.code.module.parameters
        # The compiler adds pointers to its scratch memory, of which these kernels use at most the first.
        padded = [*values, 0, 0, 0][: len(types)]
        block = ctypes.create_string_buffer(b"".join(map(_slot, types, padded)))
        launch = _Launch(
            kernel=self.code.entry,
            arguments=ctypes.addressof(block),
            grid=(ctypes.c_int32 * 3)(*grid),
            threads=num_warps * self.warp_size,
            warp_size=self.warp_size,
            order=order,
            shared_bytes=self.shared_bytes,
            workers=max(1, min(workers, grid[0] * grid[1] * grid[2])),
        )
        return launch, block


@functools.lru_cache(maxsize=512)
def _executable(
    kernel: Any, specialisation: Specialisation, target: str, num_warps: int, num_stages: int
) -> _Executable:
    name, spec = kernel.__name__, target_named(target)
    threads = num_warps * spec.warp_size
    if threads > MAX_THREADS:
        raise errors.OutOfResources(f"{name}: {threads} threads in a block, and {target} has {MAX_THREADS}")
    compiled = compile_for(kernel, specialisation, target, num_warps=num_warps, num_stages=num_stages)
    name, shared_bytes = compiled.metadata.name, compiled.metadata.shared
    if shared_bytes > spec.shared_bytes:
        raise errors.OutOfResources(
            f"{name}: {shared_bytes} bytes of shared memory, and {target} has {spec.shared_bytes}"
        )
    return executable_from(compiled.asm["llir"], name, target, shared_bytes, scratch_bytes(compiled))


def executable_from(llir: str, name: str, target: str, shared_bytes: int, scratch_bytes: int = 0) -> _Executable:
    """The host's version of a module of ``target``."""
    module = Rewriter(DIALECTS[target]).rewrite(llir, name)
    return _Executable(host.HostKernel(module), shared_bytes, target_named(target).warp_size, scratch_bytes)


class _Span(NamedTuple):
    """Memory of one or more tensors that overlap."""

    begin: int
    end: int
    names: list[str]


class _Memory:
    """Tensors' memory for the time of a launch: copies between pages that nothing may touch."""

    def __init__(self, arguments: dict[str, Any], uninitialised: Sequence[str], count: bool) -> None:
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        for name in uninitialised:
            if name not in tensors:
                raise ValueError(f"uninitialised: expected names of tensors among the arguments, got {name!r}")
        self._tensors = tensors
        self._library = host.runtime()
        self._library.vgpu_guarded.restype = ctypes.c_void_p
        self.spans = _merged(tensors)
        self.regions: list[_Region] = []
        self.shadows: list[tuple[numpy.ndarray, numpy.ndarray]] = []
        for span in self.spans:
            size = span.end - span.begin
            base = self._library.vgpu_guarded(ctypes.c_int64(size), ctypes.c_int64(span.begin % 64))
            if base is None:
                raise MemoryError(f"no memory for a copy of {'/'.join(span.names)}, {size} bytes")
            # What lies between a slice's rows is somebody else's.
            fresh = all(name in uninitialised and _is_whole(tensors[name]) for name in span.names)
            if fresh:
                ctypes.memset(base, 0xFF, size)
            else:
                ctypes.memmove(base, span.begin, size)
            shadowed = count or fresh
            readers, writers = (numpy.zeros(size if shadowed else 0, numpy.uint32) for _ in range(2))
            self.shadows.append((readers, writers))
            shadow = (readers.ctypes.data, writers.ctypes.data) if shadowed else (None, None)
            self.regions.append(_Region(base, size, *shadow, int(fresh)))
        self.table = (_Region * max(len(self.regions), 1))(*self.regions)

    def __enter__(self) -> _Memory:
        return self

    def __exit__(self, *_: object) -> None:
        for region in self.regions:
            self._library.vgpu_release(ctypes.c_void_p(region.base), ctypes.c_int64(region.bytes))

    def _place(self, name: str) -> int:
        return next(index for index, span in enumerate(self.spans) if name in span.names)

    def address(self, name: str) -> int:
        index = self._place(name)
        return int(self.regions[index].base) + self._tensors[name].data_ptr() - self.spans[index].begin

    def copy_back(self) -> None:
        for span, region in zip(self.spans, self.regions, strict=True):
            ctypes.memmove(span.begin, region.base, region.bytes)

    def describe(self, address: int) -> str:
        """Which argument an address belongs to or lies next to, and how far from its beginning."""
        distances = []
        for span, region in zip(self.spans, self.regions, strict=True):
            offset = address - int(region.base)
            distance = max(-offset, offset - region.bytes + 1, 0)
            distances.append((distance, f"{'/'.join(span.names)} at byte {offset} of {region.bytes}"))
        return min(distances)[1] if distances else f"no argument, at {address:#x}"


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill the memory from its first to its last."""
    return _reach(tensor) == max(tensor.numel(), 1)


def _reach(tensor: Tensor) -> int:
    """Elements from a tensor's first to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _merged(tensors: dict[str, Tensor]) -> list[_Span]:
    spans: list[_Span] = []
    found = []
    for name, tensor in tensors.items():
        size = _reach(tensor) * tensor.element_size() if tensor.numel() else 0
        found.append((tensor.data_ptr(), tensor.data_ptr() + size, name))
    for begin, end, name in sorted(found):
        if spans and begin < spans[-1].end:
            last = spans.pop()
            spans.append(_Span(last.begin, max(last.end, end), [*last.names, name]))
        else:
            spans.append(_Span(begin, end, [name]))
    return spans


def _counters(launch: _Launch, memory: _Memory, traffic: Any) -> Counters:
    arguments = {}
    for index, (span, (readers, writers)) in enumerate(zip(memory.spans, memory.shadows, strict=True)):
        if SCRATCH in span.names:
            continue
        arguments["/".join(span.names)] = ArgumentTraffic(
            int(numpy.count_nonzero(readers)),
            int(numpy.count_nonzero(writers)),
            traffic[index].sectors,
            traffic[index].ideal_sectors,
        )
    return Counters(arguments, *(getattr(launch.total, field[0]) for field in _Total._fields_))


_SHARED = "shared memory"
# By the runtime's number of a failure: the exception, and what happened (in the words of `_error`).
_KINDS: dict[int, tuple[type[errors.VgpuError], str]] = {
    1: (errors.OutOfBounds, "{size} bytes out of bounds: {place}"),
    2: (errors.NeverWritten, "reads what was never written: {place}"),
    3: (errors.Race, "block {block} and {others} touch the same byte: {place}"),
    4: (errors.OutOfBounds, "{size} bytes out of bounds of shared memory"),
    5: (errors.Race, "warp {warp} and {other_warp} touch the same byte of shared memory without a barrier between"),
    6: (errors.NeverWritten, "uses shared memory that an asynchronous copy has not filled yet"),
    7: (errors.Divergence, "threads of warp {other} do not arrive where the others wait"),
    8: (errors.Race, "shared memory was overwritten while an asynchronous {text} read it"),
    9: (errors.Misaligned, "an address that is not a multiple of {size}: {place}"),
    10: (errors.NotExecutable, "{text}"),
    11: (errors.NeverWritten, "reads shared memory that nothing had been written to"),
    12: (errors.NeverWritten, "ends without having waited for an asynchronous {text}"),
    13: (errors.NeverWritten, "an asynchronous operation finds shared memory stored to with no fence after it"),
    14: (errors.Deadlock, "waits for ever for {text}"),
    15: (errors.Refused, "{text}"),
    16: (errors.NeverWritten, "uses a tensor map that no fence has acquired"),
}


def _error(kernel: str, failure: _Failure, executable: _Executable, memory: _Memory) -> errors.VgpuError:
    kind, words = _KINDS[failure.kind]
    others = "others" if failure.other < 0 else f"block {failure.other}"
    message = words.format(
        size=failure.other,
        place=memory.describe(failure.address),
        block=failure.block,
        others=others,
        other=failure.other,
        warp=failure.thread // executable.warp_size,
        other_warp="others" if failure.other < 0 else f"warp {failure.other}",
        text=failure.text.decode(),
    )
    sites = executable.code.module.sites
    line = sites[failure.site].line if 0 <= failure.site < len(sites) else 0
    where = f"{kernel}, block {failure.block}, thread {failure.thread}" + (f", line {line}" if line else "")
    return kind(f"{where}: {message}")


def compare_orders(
    kernel: Any, grid: Sequence[int], *args: Any, orders: Sequence[int] = (0, 1), **keywords: Any
) -> Counters:
    """As `run`, once per warp order, and refuse results that differ; the tensors hold those of the last order.

    Raises:
        Race: a tensor differs between two orders in any bit.
    """
    arguments = _bound(kernel, args, {k: v for k, v in keywords.items() if k in kernel.arg_names})
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    before = {name: _bytes_around(tensor).clone() for name, tensor in tensors.items()}
    first: dict[str, Tensor] = {}
    counters = Counters()
    for order in orders:
        for name, tensor in tensors.items():
            _bytes_around(tensor).copy_(before[name])
        counters = run(kernel, grid, *args, warp_order=order, **keywords)
        for name, tensor in tensors.items():
            bits = _bytes_around(tensor)
            if not torch.equal(first.setdefault(name, bits.clone()), bits):
                raise errors.Race(f"{kernel.__name__}: {name} differs between warp orders {orders[0]} and {order}")
    return counters


def _bytes_around(tensor: Tensor) -> Tensor:
    """All of the memory that a tensor is a view of."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
