"""The machine that figures belong to: GPU, clocks, driver, versions, commit; and what it can do at best, measured."""

from __future__ import annotations

import functools
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import fusedres
from fusedres.bench.setting import DTYPES, Device
from fusedres.measure.timing import Timing, clock_for

__all__ = ["Clocks", "Machine", "Peaks", "clocks", "machine", "peaks"]

COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
MULTIPLIED = {"cuda": 8192, "cpu": 512}


@dataclass(frozen=True)
class Machine:
    """Device and versions; an empty string where there is none."""

    device: str
    processor: str
    threads: int
    driver: str
    python: str
    torch: str
    triton: str
    cuda: str
    cudnn: str
    fusedres: str
    commit: str


@dataclass(frozen=True)
class Clocks:
    """Of a GPU while it is at work: MHz of multiprocessors and memory, watts drawn, degrees; None where unknown."""

    sm_mhz: int | None = None
    memory_mhz: int | None = None
    watts: float | None = None
    celsius: int | None = None


def machine(device: Device) -> Machine:
    """What identifies a measurement on ``device``."""
    name = _processor()
    if device.is_gpu:
        name = torch.cuda.get_device_name(device.torch)
    elif device.executed_on_cpu:
        name = f"{device.name}, emulated"
    cudnn = torch.backends.cudnn.version() if device.is_gpu else None
    return Machine(
        device=name,
        processor=_processor(),
        threads=torch.get_num_threads(),
        driver=_driver(device),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_triton(),
        cuda=(torch.version.hip or torch.version.cuda or "") if device.is_gpu else "",
        cudnn=str(cudnn or ""),
        fusedres=fusedres.__version__,
        commit=_commit(),
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)


@functools.cache
def _commit() -> str:
    """Of the source tree this runs from, with a + if it was changed; empty for an installed wheel."""
    folder = Path(__file__).resolve().parent
    head = _output(["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"])
    if not head:
        return ""
    changed = _output(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"])
    return head + ("+" if changed else "")


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _queried(device: Device, what: str) -> str | None:
    """What nvidia-smi says of a GPU, or None."""
    if not device.is_gpu or torch.version.hip is not None:
        return None
    index = device.torch.index if device.torch.index is not None else torch.cuda.current_device()
    identity = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    # Indices of nvidia-smi and of PyTorch differ where some GPUs are hidden.
    chosen = f"GPU-{identity}" if identity else str(index)
    return _output(["nvidia-smi", f"--id={chosen}", f"--query-gpu={what}", "--format=csv,noheader,nounits"]) or None


@functools.cache
def _driver(device: Device) -> str:
    return _queried(device, "driver_version") or ""


def clocks(device: Device) -> Clocks:
    """What a GPU runs at now."""
    answer = _queried(device, "clocks.sm,clocks.mem,power.draw,temperature.gpu")
    values = [] if answer is None else [part.strip() for part in answer.splitlines()[0].split(",")]
    numbers = [float(value) if value.replace(".", "", 1).isdecimal() else None for value in values]
    if len(numbers) != 4:
        return Clocks()
    sm, memory, watts, celsius = numbers
    return Clocks(_whole(sm), _whole(memory), watts, _whole(celsius))


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


@dataclass(frozen=True)
class Peaks:
    """The roof: bytes per second of a copy, FLOP per second of a large matrix product, both measured here."""

    bandwidth: float
    flops: float

    def seconds(self, nbytes: int, flops: int) -> float:
        """What the bytes and FLOPs of a step take at least."""
        return max(nbytes / self.bandwidth, flops / self.flops)


@functools.cache
def peaks(device: Device, dtype: str) -> Peaks | None:
    """Measured on ``device`` in a second or two; None where kernels are emulated, and in 16 bits on a CPU."""
    if device.executed_on_cpu or not (device.is_gpu or dtype == "fp32"):
        return None  # a CPU's library multiplies fp16 for a minute
    clock = clock_for(device.torch)

    def best(step: Callable[[], object]) -> float:
        clock.seconds(step, 1)
        return Timing.of([clock.seconds(step, 3) for _ in range(5)]).low

    side = MULTIPLIED[device.torch.type]
    bandwidth = 2 * COPIED_BYTES[device.torch.type] / best(_copy(device.torch))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        flops = 2 * side**3 / best(_product(side, DTYPES[dtype], device.torch))
    finally:
        torch.set_float32_matmul_precision(precision)
        if device.is_gpu:
            torch.cuda.empty_cache()
    return Peaks(bandwidth, flops)


def _product(side: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    a, b = torch.randn((2, side, side), device=device).to(dtype)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _copy(device: torch.device) -> Callable[[], object]:
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
