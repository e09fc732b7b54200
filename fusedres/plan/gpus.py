"""What GPUs can do, from their makers' data sheets: the numbers behind rooflines and the choice of a rung."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fusedres.compiler.targets import TARGETS, Target
from fusedres.context import context, here
from fusedres.plan import constants

# What long streams of loads and multiplications reach of a data sheet's figures: 3.0 of an H100's 3.35 TB/s, 800 of
# its 989 TFLOP/s.
MEMORY_REACHED, MATRIX_REACHED = 0.9, 0.81


@dataclass(frozen=True, eq=False)  # looked up at every call of a block, by what it is and not by what it holds
class Gpu:
    """One device as PyTorch sees it.

    Attributes:
        name: how commands call it.
        title: what PyTorch's name of the device contains, lower case.
        target: of `compiler.TARGETS`.
        multiprocessors: or compute units.
        ghz: the clock of these figures, 10^9 cycles per second.
        tb_per_s: memory bandwidth, 10^12 bytes per second.
        matrix_tflops: bf16 and fp16 multiplied with fp32 accumulators, dense.
        tf32_tflops: TF32, dense; where there is none, fp32 on the matrix units.
        fp32_tflops: fp32 outside of matrix units.
        source: where the figures stand.
        alike: the entry whose figures were scaled, of a device that the table does not hold.
        measured: constants of the model of time by name, of `plan.constants.BOUNDS`, in place of its own.
    """

    name: str
    title: str
    target: str
    multiprocessors: int
    ghz: float
    tb_per_s: float
    matrix_tflops: float
    tf32_tflops: float
    fp32_tflops: float
    source: str
    alike: str | None = None
    measured: Mapping[str, float] = field(default_factory=dict)

    @property
    def arch(self) -> int | str:
        return TARGETS[self.target].arch

    @property
    def multiply_adds(self) -> float:
        """Of 16-bit numbers in a cycle, by the tensor cores of a multiprocessor."""
        return self.matrix_tflops * 1e12 / (2 * self.multiprocessors * self.ghz * 1e9)

    @property
    def bandwidth(self) -> float:
        """Bytes per second that a long stream reaches."""
        return MEMORY_REACHED * self.tb_per_s * 1e12

    def rate(self, dtype: torch.dtype, *, tf32: bool = False) -> float:
        """Floating-point operations per second that matrix products of this dtype reach."""
        return MATRIX_REACHED * self.peak(dtype, tf32=tf32)

    def peak(self, dtype: torch.dtype, *, tf32: bool = False) -> float:
        """The same by the data sheet."""
        if dtype.itemsize == 2:
            return self.matrix_tflops * 1e12
        return (self.tf32_tflops if tf32 else self.fp32_tflops) * 1e12


_HOPPER = "NVIDIA H100 Tensor Core GPU data sheet (2023)"
_AMPERE = "NVIDIA Ampere GA102 GPU architecture white paper v2 (2021), appendix A"
_ADA = "NVIDIA Ada GPU architecture white paper v2 (2023), appendix A"
_CDNA3 = "AMD Instinct MI300X data sheet (2023)"

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", "h100", "sm_90", 132, 1.83, 3.35, 989.4, 494.7, 66.9, f"{_HOPPER}, SXM5"),
        Gpu("h100_pcie", "h100 pcie", "sm_90", 114, 1.755, 2.0, 756.0, 378.0, 51.2, f"{_HOPPER}, PCIe"),
        Gpu("h200", "h200", "sm_90", 132, 1.83, 4.8, 989.4, 494.7, 66.9,
            "NVIDIA H200 Tensor Core GPU data sheet (2024), SXM"),
        Gpu("gh200", "gh200", "sm_90", 132, 1.83, 4.0, 989.4, 494.7, 66.9,
            "NVIDIA GH200 data sheet (2023), 96 GB HBM3"),
        Gpu("b200", "b200", "sm_100", 148, 1.86, 8.0, 2250.0, 1125.0, 75.0,
            "NVIDIA DGX B200 data sheet (2024), a GPU of eight"),
        Gpu("a100", "a100", "sm_80", 108, 1.41, 2.039, 312.0, 156.0, 19.5, "NVIDIA A100 data sheet (2021), 80 GB SXM"),
        Gpu("a100_40gb", "a100-sxm4-40gb", "sm_80", 108, 1.41, 1.555, 312.0, 156.0, 19.5,
            "NVIDIA A100 data sheet, 40 GB SXM"),
        Gpu("a30", "a30", "sm_80", 56, 1.44, 0.933, 165.0, 82.0, 10.3, "NVIDIA A30 data sheet (2021)"),
        Gpu("a10", "a10", "sm_86", 72, 1.695, 0.6, 125.0, 62.5, 31.2, "NVIDIA A10 data sheet (2021)"),
        Gpu("a6000", "rtx a6000", "sm_86", 84, 1.8, 0.768, 154.8, 77.4, 38.7, _AMPERE),
        Gpu("rtx3080", "rtx 3080", "sm_86", 68, 1.71, 0.760, 59.5, 29.8, 29.8, _AMPERE),
        Gpu("rtx3090", "rtx 3090", "sm_86", 82, 1.695, 0.936, 71.0, 35.6, 35.6, _AMPERE),
        Gpu("l4", "l4", "sm_89", 58, 2.04, 0.3, 121.0, 60.0, 30.3,
            "NVIDIA L4 data sheet (2023), half of its sparse rates"),
        Gpu("l40s", "l40s", "sm_89", 142, 2.52, 0.864, 362.0, 183.0, 91.6, "NVIDIA L40S data sheet (2023)"),
        Gpu("rtx4080", "rtx 4080", "sm_89", 76, 2.505, 0.717, 97.5, 48.7, 48.7, _ADA),
        Gpu("rtx4090", "rtx 4090", "sm_89", 128, 2.52, 1.008, 165.2, 82.6, 82.6, _ADA),
        Gpu("rtx5090", "rtx 5090", "sm_120", 170, 2.407, 1.792, 209.5, 104.8, 104.8,
            "NVIDIA RTX Blackwell white paper (2025)"),
        Gpu("mi210", "mi210", "gfx90a", 104, 1.7, 1.638, 181.0, 45.3, 22.6, "AMD Instinct MI210 data sheet (2022)"),
        Gpu("mi250x", "mi250x", "gfx90a", 110, 1.7, 1.638, 191.5, 47.9, 23.9,
            "AMD Instinct MI250X data sheet, one die of two"),
        Gpu("mi300x", "mi300x", "gfx942", 304, 2.1, 5.3, 1307.4, 653.7, 163.4, _CDNA3),
        Gpu("mi325x", "mi325x", "gfx942", 304, 2.1, 6.0, 1307.4, 653.7, 163.4, "AMD Instinct MI325X data sheet (2024)"),
        Gpu("mi355x", "mi355x", "gfx950", 256, 2.4, 8.0, 2516.6, 157.3, 157.3, "AMD Instinct MI355X data sheet (2025)"),
        Gpu("rx7900xtx", "7900 xtx", "gfx1100", 96, 2.5, 0.96, 122.8, 61.4, 61.4,
            "AMD Radeon RX 7900 XTX specifications"),
    )
}  # fmt: skip


HERE = "here"


def gpu_named(name: str) -> Gpu:
    """The `Gpu` called ``name``, or the first device of this machine for ``"here"``; ValueError otherwise.

    With the constants that this user has had measured for it (`fusedres calibrate`).
    """
    if name.lower() == HERE:
        if not torch.cuda.is_available():
            raise ValueError(f"gpu: expected a machine with a GPU for {HERE!r}, and PyTorch sees none")
        return device_gpu(0)
    key = name.lower().replace("-", "_").replace(" ", "_")
    if key not in GPUS:
        near = difflib.get_close_matches(key, GPUS, n=5, cutoff=0.5) or list(GPUS)
        raise ValueError(f"gpu: expected a name such as {', '.join(near)}, got {name!r}")
    return _as_measured(GPUS[key])


@functools.cache
def device_gpu(index: int) -> Gpu:
    """The table's entry for a CUDA or HIP device, or that of the one which is nearest, scaled to it; and measured
    constants, as in `gpu_named`."""
    properties: Any = torch.cuda.get_device_properties(index)
    found = nearest_gpu(properties.name, _target(properties))
    return _as_measured(found if found.title in properties.name.lower() else scaled(found, properties))


@functools.cache  # one object for a GPU, since choices are kept by it
def _as_measured(gpu: Gpu) -> Gpu:
    found = constants.measured_for(gpu.name, gpu.multiprocessors)
    return replace(gpu, measured=found) if found else gpu


def forget_measured() -> None:
    """Let files of constants be read anew; a `Gpu` that is in use stays as it is."""
    _as_measured.cache_clear()
    device_gpu.cache_clear()


def nearest_gpu(title: str, target: str) -> Gpu:
    """The entry whose title PyTorch's name of a device contains, the longest of several; else one of its target.

    A device that the table does not hold is taken for the slowest of its architecture, and one of an unknown
    architecture for an A100.
    """
    fitting = [gpu for gpu in GPUS.values() if gpu.title in title.lower()]
    if fitting:
        return max(fitting, key=lambda gpu: len(gpu.title))
    alike = [gpu for gpu in GPUS.values() if gpu.target == target]
    return min(alike, key=lambda gpu: gpu.tb_per_s) if alike else GPUS["a100"]


def scaled(like: Gpu, properties: Any) -> Gpu:
    """``like`` with the multiprocessors, clock and bandwidth of a device, as far as its driver tells.

    Args:
        like: of the table.
        properties: as of `torch.cuda.get_device_properties`: ``clock_rate`` and ``memory_clock_rate`` in kHz, of which
            memory moves a bit of ``memory_bus_width`` at each of two edges.
    """
    count = int(properties.multi_processor_count)
    ghz = getattr(properties, "clock_rate", 0) / 1e6 or like.ghz
    bits = 2e3 * getattr(properties, "memory_clock_rate", 0) * getattr(properties, "memory_bus_width", 0)
    faster = count * ghz / (like.multiprocessors * like.ghz)
    return replace(
        like, name=properties.name, title=properties.name.lower(), multiprocessors=count, ghz=ghz,
        tb_per_s=bits / 8e12 or like.tb_per_s, matrix_tflops=faster * like.matrix_tflops,
        tf32_tflops=faster * like.tf32_tflops, fp32_tflops=faster * like.fp32_tflops,
        source=f"those of {like.title}, scaled by multiprocessors, clock and bandwidth as the driver tells them",
        alike=like.name,
    )  # fmt: skip


@functools.cache
def target_gpu(target: Target) -> Gpu:
    """The first entry of a target, for kernels that are executed or recorded on other devices."""
    alike = (gpu for gpu in GPUS.values() if TARGETS[gpu.target][:2] == target[:2])
    return next(alike, GPUS["a100"])


def assumed_gpu() -> Gpu | None:
    """What `assume_gpu` says, if anything."""
    gpu: Gpu | None = here().gpu
    return gpu


def assume_gpu(gpu: Gpu) -> AbstractContextManager[None]:
    """Choose for ``gpu`` on this thread inside the ``with`` block, whatever the device of the tensors."""
    return context(gpu=gpu)


def _target(properties: Any) -> str:
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
