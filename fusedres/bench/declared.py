"""What a step moves and computes by declaration: a dry run on the meta device, which takes a second and no memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fusedres
from fusedres.bench.cases import Case, ModelCase, OpCase
from fusedres.bench.contenders import YARDSTICK, Contender
from fusedres.bench.setting import Device, Setting
from fusedres.compiler.targets import TARGETS
from fusedres.explain import Explanation, Question, explain
from fusedres.models.sources import Source
from fusedres.patterns.choose import AUTO
from fusedres.plan.gpus import Gpu, nearest_gpu, target_gpu
from fusedres.runtime.launch import DRY_RUN_TARGET
from fusedres.runtime.torch_private import DispatchMode
from fusedres.traffic.tensors import first_tensor

__all__ = ["Declared", "declared", "flops_of", "gpu_of", "target_for"]

# Library calls beside which the declared bytes of our kernels are not those of the whole step.
CONTRACTIONS = (
    torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default, torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
)  # fmt: skip


@dataclass(frozen=True)
class Declared:
    """Of one step: launches, bytes and FLOPs, and how many of the launches are the library's.

    ``whole``: whether the bytes are those of the whole step.
    """

    launches: int
    nbytes: int
    flops: int
    library_calls: int
    whole: bool = True


class _Contractions(DispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in CONTRACTIONS
        return func(*args, **(kwargs or {}))


def target_for(device: Device) -> str:
    """The target whose kernels ``device`` runs, or the dry run's own where it runs none."""
    if device.executed_on_cpu:
        return device.name.partition(":")[2]
    if device.is_gpu and torch.version.hip is not None:
        # Versions of torch differ in which of these their type stubs name.
        properties: Any = torch.cuda.get_device_properties(device.torch)
        name = properties.gcnArchName.split(":")[0]
        return name if name in TARGETS else "gfx942"
    if device.is_gpu:
        major, minor = torch.cuda.get_device_capability(device.torch)
        return nearest(10 * major + minor)
    return DRY_RUN_TARGET


def nearest(capability: int) -> str:
    """The listed NVIDIA target of this compute capability, or the highest below it."""
    known = sorted(int(name.removeprefix("sm_")) for name in TARGETS if name.startswith("sm_"))
    return f"sm_{max((one for one in known if one <= capability), default=known[0])}"


def gpu_of(device: Device) -> Gpu:
    """The entry of the table of GPUs that figures are computed for."""
    target = target_for(device)
    if device.is_gpu:
        return nearest_gpu(torch.cuda.get_device_name(device.torch), target)
    return target_gpu(TARGETS[target])


def declared(case: Case, setting: Setting, contender: Contender) -> Declared | None:
    """What a step of eager PyTorch or of a fused contender declares on the setting's GPU; None for other contenders.

    Nothing of the case's data is needed. Library calls read each input once and write each output once.

    Raises:
        ValueError: the model has nothing to fuse, or cannot be counted.
    """
    if isinstance(case, OpCase):
        return None if contender.schedule is None else _declared_op(case, setting)
    if contender.schedule is None and not contender.name.startswith(YARDSTICK):
        return None
    explained = _explained(case, setting, contender.schedule or AUTO)
    step = explained.eager if contender.schedule is None else explained.rungs[contender.schedule]
    return Declared(
        len(step.entries), sum(entry.bytes for entry in step.entries), sum(entry.flops for entry in step.entries),
        sum(not entry.ours for entry in step.entries),
    )  # fmt: skip


def _declared_op(case: OpCase, setting: Setting) -> Declared:
    with fusedres.backend("auto"), _Contractions() as library, fusedres.record(target_for(setting.device)) as trace:
        one = case.operands(1, setting.px, setting.storage, torch.Generator().manual_seed(0))
        case.fused(*(_on_meta(operand, setting.batch) for operand in one))
    nbytes = trace.bytes_read + trace.bytes_written
    whole = bool(trace.launches) and not library.count
    return Declared(len(trace.launches), nbytes, trace.flops, library.count, whole)


@functools.lru_cache(maxsize=8)  # the contenders of a comparison ask for the same ones
def _explained(case: ModelCase, setting: Setting, schedule: str) -> Explanation:
    dtype = "fp32" if setting.dtype == "tf32" else setting.dtype
    question = Question(
        case.name, setting.batch, dtype, gpu_of(setting.device).name, (schedule,), not setting.train,
        (case.channels, setting.px, setting.px), images_grad=case.kind == "block" and setting.train,
    )  # fmt: skip
    return explain(question, model=Source(case.name, case.build, (case.channels, case.px, case.px)))


def _on_meta(operand: Tensor, batch: int) -> Tensor:
    """Of the same kind and size, for ``batch`` images instead of one."""
    if operand.dim() != 4 or operand.shape[0] != 1:
        return operand.to("meta")
    layout = torch.channels_last if operand.is_contiguous(memory_format=torch.channels_last) else None
    made = torch.empty((batch, *operand.shape[1:]), dtype=operand.dtype, device="meta")
    return made.contiguous(memory_format=layout) if layout is not None else made


def flops_of(case: Case, setting: Setting) -> int | None:
    """FLOPs of the plain model's convolutions and matrix products in one step, whoever computes it."""
    if isinstance(case, OpCase):
        return None
    with torch.device("meta"):
        model = case.on_meta().train(setting.train)
        x = torch.empty(setting.batch, case.channels, setting.px, setting.px)
    x.requires_grad_(setting.train and case.kind == "block")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(setting.train):
        z = first_tensor(model(x))
        if setting.train:
            z.sum().backward()
    return int(counter.get_total_flops())
