"""What is decided once, at the door, for all that a fused pass does."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fusedres.compiler.targets import Target
from fusedres.context import here
from fusedres.plan.gpus import Gpu, assumed_gpu, device_gpu, target_gpu
from fusedres.runtime import autocast, backends
from fusedres.runtime.autocast import contraction_dtype, no_autocast
from fusedres.runtime.launch import multiplies_in_tf32, target_of, wants_kernels


def gpu_of(x: Tensor) -> Gpu:
    """The GPU that kernels launched on ``x`` run on, or are thought to."""
    return device_gpu(x.get_device()) if x.is_cuda else assumed_gpu() or target_gpu(target_of(x))


@dataclass(frozen=True)
class Call:
    """One call of a fused pattern, forward and backward.

    Attributes:
        dtype: of the contractions (autocast's, or the input's own).
        kernels: whether ops run theirs; in fp64 there are none.
        backend: on which ops run.
        device: the type of the tensors' device.
        autocast: whether it is on.
        differentiated: whether autograd follows the call.
        tf32: whether kernels may round fp32 factors to TF32.
        absent: whether x stands for no samples, and nothing has a gradient (`context`).
        target, gpu: what runs the kernels, or is thought to; None without kernels.
    """

    dtype: torch.dtype
    kernels: bool = False
    backend: str = backends.DEFAULT
    device: str = "cpu"
    autocast: bool = False
    differentiated: bool = True
    tf32: bool = False
    absent: bool = False
    target: Target | None = field(default=None, compare=False)
    gpu: Gpu | None = field(default=None, compare=False)

    @classmethod
    def on(cls, x: Tensor, tensors: Iterable[Tensor | None]) -> Call:
        """A call made now.

        Args:
            x: its input.
            tensors: everything else whose gradient may be asked for.
        """
        device, dtype = x.device.type, contraction_dtype(x)
        # What is exported is differentiated by nobody, whatever its parameters ask for.
        every = (x, *tensors) if torch.is_grad_enabled() and not torch.compiler.is_exporting() else ()
        differentiated = any(tensor is not None and tensor.requires_grad for tensor in every)
        decided = (backends.current(), device, autocast.enabled(device), differentiated)
        if dtype == torch.float64 or not wants_kernels(x):
            return cls(dtype, False, *decided, absent=here().absent)
        return cls(dtype, True, *decided, multiplies_in_tf32(x), here().absent, target_of(x), gpu_of(x))

    def without_autocast(self) -> AbstractContextManager[object]:
        """Autocast off, where it is on."""
        return no_autocast(self.device) if self.autocast else nullcontext()
