"""What one row of a benchmark is measured under: mode, number format, sizes, device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

import fusedres
from fusedres.runtime.backends import VGPU
from fusedres.runtime.devices import default_device, existing_device, made_current

__all__ = ["DTYPES", "EXACT", "MODES", "Device", "NotSupported", "Setting", "device_named"]

MODES = ("train", "infer", "op")
# Storage of what is multiplied. tf32 is fp32 in memory, rounded by the GPU as it multiplies.
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What others are held against; never timed.
EXACT = "fp64"


class NotSupported(RuntimeError):
    """A case can not be run so, as is found when it is prepared: no engine of cuDNN's, or no block that is known."""


@dataclass(frozen=True)
class Device:
    """Where tensors live, and the backend that fused contenders run on there."""

    name: str
    torch: torch.device
    backend: str = "auto"

    @property
    def executed_on_cpu(self) -> bool:
        """Whether kernels are emulated, so that times mean nothing."""
        return self.backend.startswith(VGPU)

    @property
    def is_gpu(self) -> bool:
        return self.torch.type == "cuda"

    def made_current(self) -> AbstractContextManager[object]:
        """What is measured runs inside, since contenders' libraries need not ask a tensor where it lives."""
        return made_current(self.torch)


def device_named(name: str) -> Device:
    """The device called ``name``: ``auto``, ``cpu``, ``cuda``, ``cuda:<index>``, or ``vgpu:<target>``.

    Raises:
        ValueError: there is none, or this machine has not got it.
        fusedres.vgpu.Unavailable: kernels can not be executed on this machine.
    """
    if name == "auto":
        name = default_device()
    if name.startswith(VGPU):
        with fusedres.backend(name):
            return Device(name, torch.device("cpu"), name)
    return Device(name, existing_device(name, "auto", f"{VGPU}<target>"))


@dataclass(frozen=True)
class Setting:
    """``mode``: one of `MODES`; ``dtype``: one of `DTYPES`; ``batch`` images of ``px`` x ``px`` pixels."""

    mode: str
    dtype: str
    batch: int
    px: int
    device: Device

    @property
    def storage(self) -> torch.dtype:
        return torch.float64 if self.dtype == EXACT else DTYPES[self.dtype]

    @property
    def train(self) -> bool:
        return self.mode == "train"

    def autocast(self) -> AbstractContextManager[object]:
        """Training in 16 bits keeps its parameters in fp32, as users of mixed precision do."""
        if self.train and self.storage.itemsize == 2:
            return torch.autocast(self.device.torch.type, self.storage)
        return nullcontext()

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """TF32 where the setting says so and nowhere else, for convolutions and matrix products."""
        convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
        torch.backends.cudnn.allow_tf32 = self.dtype == "tf32"
        torch.set_float32_matmul_precision("high" if self.dtype == "tf32" else "highest")
        try:
            yield
        finally:
            torch.backends.cudnn.allow_tf32 = convolutions
            torch.set_float32_matmul_precision(products)

    def why_not(self) -> str | None:
        """Why nothing can be measured under this setting, or None."""
        if self.dtype == "tf32" and not self.device.is_gpu:
            return "TF32 is a format of GPUs"
        return None
