"""The one door through which kernels are started: on a GPU, on the CPU, or only on paper."""

from __future__ import annotations

import contextvars
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fusedres.compiler.binary import Binary, Specialisation, compile_options, scratch_bytes, specialise
from fusedres.compiler.folders import use_for
from fusedres.compiler.known import register_limit
from fusedres.compiler.targets import TARGETS, Target, target_named, triton, why_no_kernels
from fusedres.context import accounts, context, here, on_all_threads
from fusedres.runtime import backends, switches

if TYPE_CHECKING:
    from fusedres.plan.gpus import Gpu
    from fusedres.vgpu import Counters

DRY_RUN_TARGET = "sm_90"
# CUDA's limits, which are the smallest of the vendors'.
MAX_GRID = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True)
class Launch:
    """One start of a kernel and what it declares to move and to compute.

    Attributes:
        kernel: the ``@triton.jit`` function.
        grid: blocks along each axis.
        specialisation: the types and constants its binary is compiled for.
        num_warps, num_stages, all_registers, registers: of the binary.
        read, written: declared bytes by argument, each byte counted once.
        flops: declared floating-point operations (a multiplication and an addition are two).
        steps: how often each loop of a block runs on average, an inner one in all, in the order in which they begin.
        kind: of work, one of `traffic.aten.KINDS`.
        counters: what the launch really did, where it was executed on the CPU.
        arguments: every argument by name, tensors on the meta device; of a dry run that keeps them.
    """

    kernel: Any
    grid: tuple[int, ...]
    specialisation: Specialisation
    num_warps: int
    num_stages: int
    all_registers: bool
    read: Mapping[str, int]
    written: Mapping[str, int]
    flops: int
    kind: str
    steps: tuple[float, ...] = ()
    counters: Counters | None = None
    registers: int = 0
    arguments: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def bytes_read(self) -> int:
        return sum(self.read.values())

    @property
    def bytes_written(self) -> int:
        return sum(self.written.values())

    @property
    def binary(self) -> Binary:
        told = self.num_warps, self.num_stages, self.all_registers, self.registers
        return Binary(self.kernel, self.specialisation, *told)


@dataclass(eq=False)  # two that hold the same launches are still two
class Trace:
    """The launches of a `record` block, in order; ``target`` is the GPU of a dry run, ``keeps`` whether arguments are
    kept of it."""

    target: str = DRY_RUN_TARGET
    launches: list[Launch] = field(default_factory=list)
    keeps: bool = False

    @property
    def bytes_read(self) -> int:
        return sum(launch.bytes_read for launch in self.launches)

    @property
    def bytes_written(self) -> int:
        return sum(launch.bytes_written for launch in self.launches)

    @property
    def flops(self) -> int:
        return sum(launch.flops for launch in self.launches)

    def by_kernel(self) -> Counter[str]:
        """How often each kernel was launched."""
        return Counter(launch.name for launch in self.launches)


@contextmanager
def record(target: str = DRY_RUN_TARGET) -> Iterator[Trace]:
    """Keep an account of every kernel launched inside the ``with`` block, on any thread.

    Tensors on the meta device make a dry run: ops that have a kernel record its launch and compute nothing.

    Args:
        target: the GPU whose launches a dry run makes, a name of `compiler.TARGETS`: tiles depend on it.

    Raises:
        ValueError: no such target.
    """
    target_named(target)
    trace = Trace(target)
    with context(dry_target=target), on_all_threads(trace):
        yield trace


def is_recorded() -> bool:
    """Whether somebody keeps account of launches."""
    return bool(_traces())


def _traces() -> tuple[Trace, ...]:
    own: Trace | None = here().account
    return accounts() if own is None else (own,)


class Follower(Protocol):
    """Who wants to do launches again."""

    def apart(self) -> AbstractContextManager[None]:
        """Surrounds a launch."""

    def launched(self, start: Callable[..., object], arguments: Sequence[Any], *, on_gpu: bool) -> None:
        """``start(*arguments)`` launches once more what has been launched; ``on_gpu`` it may be told the ``stream``."""


def follow(follower: Follower) -> AbstractContextManager[None]:
    """Tell ``follower`` of every launch on this thread inside the ``with`` block."""
    return context(follower=follower)


def wants_kernels(tensor: Tensor) -> bool:
    """Whether an op called now on ``tensor`` should launch its kernel."""
    if switches.DISABLED:
        return False
    if tensor.is_meta:
        return is_recorded() and backends.current() in ("auto", "triton")
    return backends.runs_kernels(tensor.device.type) and not left_to_library(tensor)


def left_to_library(tensor: Tensor) -> bool:
    """Whether a tensor is on a GPU that the backend ``"auto"`` runs no kernels on."""
    return tensor.is_cuda and backends.current() == "auto" and why_not_on(tensor.get_device()) is not None


@functools.cache
def why_not_on(index: int) -> str | None:
    """Why the backend ``"auto"`` runs no kernels on a CUDA or HIP device, or None."""
    return why_no_kernels(_device_target(index))


def target_of(tensor: Tensor) -> Target:
    """The GPU that a kernel launched on ``tensor`` is compiled for; on the meta device, that of the dry run."""
    if tensor.is_cuda:
        return _device_target(tensor.get_device())
    if tensor.is_meta and is_recorded():
        return _assumed(here().dry_target or _traces()[-1].target, here().gpu)
    return TARGETS[backends.vgpu_target() or DRY_RUN_TARGET]


def multiplies_in_tf32(tensor: Tensor) -> bool:
    """Whether a kernel launched on ``tensor`` may round fp32 factors to TF32, as the library's convolutions do."""
    return tensor.dtype == torch.float32 and tf32_allowed() and target_of(tensor).backend == "cuda"


def tf32_allowed() -> bool:
    """Whether the library's convolutions may round fp32 factors to TF32."""
    # What PyTorch had before, `cudnn.allow_tf32`, sets this too, and refuses to be read where this was set by itself.
    cudnn: Any = torch.backends.cudnn  # whose stubs lack it
    allowed: bool = cudnn.conv.fp32_precision == "tf32"
    return allowed


@functools.cache
def _assumed(name: str, gpu: Gpu | None) -> Target:
    """A target, with the multiprocessors of the GPU that is assumed."""
    target = TARGETS[name]
    return target if gpu is None or gpu.target != name else target._replace(multiprocessors=gpu.multiprocessors)


@functools.cache
def target_name(index: int) -> str:
    """What a CUDA or HIP device is called among `compiler.TARGETS`, if it is one of them."""
    target = _device_target(index)
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


@functools.cache
def _device_target(index: int) -> Target:
    # Versions of torch differ in which of these their type stubs name.
    properties: Any = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        shared = int(properties.shared_memory_per_block)
        arch = properties.gcnArchName.split(":")[0]
        return Target("hip", arch, properties.warp_size, shared, properties.multi_processor_count)
    # More than a block gets unless it asks.
    shared = int(properties.shared_memory_per_block_optin)
    return Target("cuda", 10 * properties.major + properties.minor, 32, shared, properties.multi_processor_count)


@functools.cache
def look_into_folders(index: int) -> None:
    """Find binaries that were compiled elsewhere; once for a device, before anything is compiled for it."""
    use_for(target_name(index))


def launch(
    kernel: Any,
    grid: Sequence[int],
    arguments: Mapping[str, Any],
    *,
    reads: Sequence[str],
    writes: Sequence[str],
    partial: Mapping[str, int] | None = None,
    flops: int = 0,
    steps: Sequence[float] = (),
    kind: str = "other",
    num_warps: int = 4,
    num_stages: int = 3,
    all_registers: bool = False,
    registers: int = 0,
) -> None:
    """Start ``kernel`` on the device of its tensors.

    On a GPU it runs there; with the backend ``vgpu:<target>`` it is executed on the CPU; on meta tensors it is only
    recorded.

    Args:
        kernel: a ``@triton.jit`` function.
        grid: blocks along each axis; nothing is started if one of them is 0.
        arguments: every argument of the kernel by name, compile-time ones included.
        reads, writes: names of the tensors that the kernel reads and writes. Each is declared to move all its bytes
            once, ...
        partial: ... unless it moves fewer: bytes by name.
        flops: floating-point operations.
        steps: how often each loop of a block runs on average, an inner one in all, in the order in which they begin.
        kind: of work, one of `traffic.aten.KINDS`.
        num_warps, num_stages, all_registers, registers: of the binary (`compiler.Binary`).

    Raises:
        ValueError: a grid or a whole number beyond what kernels address, tensors on several devices, or partial bytes
            of what is not moved.
        RuntimeError: the tensors are on a device that runs no kernels.
    """
    if 0 in grid:
        return
    moved = partial or {}
    _check(kernel, grid, arguments, moved.keys() - {*reads, *writes})
    tensor = next(arguments[name] for name in (*reads, *writes) if arguments[name] is not None)
    follower: Follower | None = here().follower
    options = {"num_warps": num_warps, "num_stages": num_stages}
    counters = None
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            target = target_of(tensor)
            look_into_folders(tensor.get_device())
            limit = 0
            if all_registers and target.backend == "cuda":
                limit = registers or _register_limit(kernel, arguments, num_warps, num_stages, f"sm_{target.arch}")
            options = compile_options(target.backend, num_warps, num_stages, registers=limit)
            first = with_scratch(kernel[tuple(grid)])
            with nullcontext() if follower is None else follower.apart():
                binary = _started(kernel, tensor.device, lambda: first(**arguments, **options))
        if follower is not None:
            # A binary takes a kernel's arguments by position, and does not look at them again.
            start = binary[(*grid, 1, 1)[:3]]
            if scratch_bytes(binary):
                start = with_scratch(start)
            follower.launched(start, [arguments[name] for name in kernel.arg_names], on_gpu=True)
    elif not tensor.is_meta:
        fresh = [name for name in writes if name not in reads]
        with nullcontext() if follower is None else follower.apart():
            counters = _started(kernel, tensor.device, lambda: _execute(kernel, grid, arguments, fresh, options))
        if follower is not None:
            names = tuple(arguments)

            def start(*values: Any) -> None:
                _execute(kernel, grid, dict(zip(names, values, strict=True)), fresh, options)

            follower.launched(start, list(arguments.values()), on_gpu=False)
    traces = _traces()
    if traces:
        read, written = (
            {name: moved.get(name, nbytes(arguments[name])) for name in names if arguments[name] is not None}
            for names in (reads, writes)
        )
        entry = Launch(
            kernel, tuple(grid), specialise(kernel, arguments), num_warps, num_stages, all_registers, read, written,
            flops, kind, tuple(steps), counters, registers,
            dict(arguments) if tensor.is_meta and any(trace.keeps for trace in traces) else None,
        )  # fmt: skip
        for trace in traces:
            trace.launches.append(entry)


def again(one: Launch, arguments: Mapping[str, Any]) -> None:
    """Launch once more what was recorded, with other tensors of the same kinds."""
    launch(
        one.kernel, one.grid, arguments, reads=tuple(one.read), writes=tuple(one.written), flops=one.flops,
        steps=one.steps, kind=one.kind, num_warps=one.num_warps, num_stages=one.num_stages,
        all_registers=one.all_registers, registers=one.registers,
    )  # fmt: skip


def with_scratch(start: Callable[..., Any]) -> Callable[..., Any]:
    """``start``, which launches on the current device, with memory for what compilers keep there (tensor maps).

    Triton asks the allocator of the calling context for it, of which each thread has one: autograd's have none. What
    the program has set there for kernels of its own stays as it is.
    """

    def started(*arguments: Any, **keywords: Any) -> Any:
        return contextvars.copy_context().run(in_copy, arguments, keywords)

    def in_copy(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        triton.set_allocator(_scratch)
        return start(*arguments, **keywords)

    return started


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """PyTorch's allocator aligns by 512, and gives memory away again in the order of the current stream."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


_limits: dict[tuple[Any, ...], int] = {}


def _register_limit(kernel: Any, arguments: Mapping[str, Any], num_warps: int, num_stages: int, target: str) -> int:
    """`known.register_limit` of what is launched, kept by what tells its binaries apart."""
    told = [_kind(parameter, arguments[parameter.name]) for parameter in kernel.params]
    key = (kernel, num_warps, num_stages, target, *told)
    if key not in _limits:
        binary = Binary(kernel, specialise(kernel, arguments), num_warps, num_stages, all_registers=True)
        _limits[key] = register_limit(binary, target)
    return _limits[key]


def _kind(parameter: Any, value: Any) -> Any:
    if parameter.is_constexpr or value is None:
        return value
    return value.dtype if isinstance(value, Tensor) else value == 1


class LaunchFailed(RuntimeError):
    """A kernel could not be compiled for, loaded on or started on a device; nothing of it has run.

    Attributes:
        kernel: its name.
        device: where.
    """

    def __init__(self, kernel: str, device: str, error: BaseException) -> None:
        what = str(error).strip() or type(error).__name__
        super().__init__(f"{kernel} could not be started on {device}: {type(error).__name__}: {what}")
        self.kernel, self.device = kernel, device


def _started(kernel: Any, device: torch.device, start: Callable[[], Any]) -> Any:
    try:
        return start()
    except torch.OutOfMemoryError:  # the plain modules need no less
        raise
    except Exception as error:
        # On the CPU an exception may also be what the emulation saw in a kernel, which is for whoever wrote it.
        if device.type == "cuda" or isinstance(error, _compiler_errors()):
            raise LaunchFailed(kernel.__name__, str(device), error) from error
        raise


@functools.cache
def _compiler_errors() -> tuple[type[Exception], ...]:
    """What Triton raises where a kernel can not be compiled for a device, or asks for more than it has."""
    if triton is None:
        return ()
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import TritonError

    return CompilationError, TritonError


def nbytes(tensor: Tensor) -> int:
    """Bytes of the elements that a tensor has in memory: those along an expanded dimension count once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * tensor.element_size()


def _check(kernel: Any, grid: Sequence[int], arguments: Mapping[str, Any], unmoved: Set[str]) -> None:
    if unmoved:
        raise ValueError(
            f"{kernel.__name__}: partial: expected names of what is read or written, got {sorted(unmoved)}"
        )
    for size, limit in zip(grid, MAX_GRID, strict=False):
        if size > limit:
            raise ValueError(f"{kernel.__name__}: a grid of {tuple(grid)} blocks exceeds the limit of {MAX_GRID}")
    first: tuple[str, torch.device] | None = None
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            first = first or (name, value.device)
            if value.device != first[1]:
                raise ValueError(
                    f"{kernel.__name__}: {name}: expected a tensor on {first[1]}, where {first[0]} is, got one on "
                    f"{value.device}"
                )
            if value.is_neg():
                raise ValueError(
                    f"{kernel.__name__}: {name}: expected values as they lie in memory, got a negated view"
                )
        elif isinstance(value, int) and not -(2**31) <= value < 2**31:
            raise ValueError(f"{kernel.__name__}: {name}: expected a number of 32 bits, got {value}")


def _execute(
    kernel: Any, grid: Sequence[int], arguments: Mapping[str, Any], fresh: Sequence[str], options: Mapping[str, int]
) -> Counters:
    target = backends.vgpu_target()
    if target is None:
        raise RuntimeError(
            f"{kernel.__name__}: the backend {backends.current()!r} runs kernels on CUDA and HIP tensors, and these "
            "are on the CPU: move them to a GPU, or choose backend('vgpu:<target>') or backend('auto')"
        )
    # Imported here, since only this way needs it.
    from fusedres import vgpu

    present = [name for name in fresh if arguments[name] is not None]
    return vgpu.run(kernel, grid, target=target, uninitialised=present, count=is_recorded(), **options, **arguments)
