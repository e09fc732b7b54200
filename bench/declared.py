"""What a step moves and computes by declaration: a dry run on the meta device, which takes a second and no memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fusedres
from fusedres.bench.cases import Case, ModelCase, OpCase
from fusedres.bench.contenders import Contender
from fusedres.bench.setting import Device, Setting
from fusedres.launch import DRY_RUN_TARGET
from fusedres.offline import TARGETS

__all__ = ["Declared", "declared", "flops_of", "target_for"]

# Library calls beside which the declared bytes of our kernels are not those of the whole step.
CONTRACTIONS = (
    torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default, torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
)  # fmt: skip


@dataclass(frozen=True)
class Declared:
    """Of fusedres' kernels in one step. ``library_calls``: contractions beside them, whose bytes are not in here."""

    launches: int
    nbytes: int
    flops: int
    library_calls: int

    @property
    def whole(self) -> bool:
        """Whether the kernels do all of the step's work."""
        return self.launches > 0 and self.library_calls == 0


class _Contractions(TorchDispatchMode):
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


def declared(case: Case, setting: Setting, contender: Contender) -> Declared | None:
    """The launches, bytes and FLOPs of a fused contender's step on the setting's GPU; None for other contenders.

    Nothing of the case's data is needed. In 16 bits a network's parameters are counted in 16 bits too, but for batch
    norm's, as kernels see them under autocast.
    """
    if contender.schedule is None:
        return None
    with fusedres.backend("auto"), _Contractions() as library, fusedres.record(target_for(setting.device)) as trace:
        if isinstance(case, OpCase):
            one = case.operands(1, setting.px, setting.storage, torch.Generator().manual_seed(0))
            case.fused(*(_on_meta(operand, setting.batch) for operand in one))
        else:
            _model_step(case, setting, contender.schedule)
    nbytes = trace.bytes_read + trace.bytes_written
    return Declared(len(trace.launches), nbytes, trace.flops, library.count)


def _on_meta(operand: Tensor, batch: int) -> Tensor:
    """Of the same kind and size, for ``batch`` images instead of one."""
    if operand.dim() != 4 or operand.shape[0] != 1:
        return operand.to("meta")
    layout = torch.channels_last if operand.is_contiguous(memory_format=torch.channels_last) else None
    made = torch.empty((batch, *operand.shape[1:]), dtype=operand.dtype, device="meta")
    return made.contiguous(memory_format=layout) if layout is not None else made


def _plain_on_meta(case: ModelCase, setting: Setting) -> tuple[nn.Module, Tensor]:
    with torch.device("meta"):
        model = case.build().to(setting.storage).to(memory_format=torch.channels_last)
        x = torch.empty(setting.batch, case.channels, setting.px, setting.px, dtype=setting.storage)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_(setting.train and case.kind == "block")
    return model.train(setting.train), x


def _model_step(case: ModelCase, setting: Setting, schedule: str) -> None:
    model, x = _plain_on_meta(case, setting)
    fusedres.fuse(model, schedule=schedule)
    with torch.set_grad_enabled(setting.train):
        z = model(x)
        if setting.train:
            z.backward(torch.empty_like(z))


def flops_of(case: Case, setting: Setting) -> int | None:
    """FLOPs of the plain model's convolutions and matrix products in one step, whoever computes it."""
    if isinstance(case, OpCase):
        return None
    model, x = _plain_on_meta(case, setting)
    model = copy.deepcopy(model).float()
    x = x.detach().float().requires_grad_(x.requires_grad)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(setting.train):
        z = model(x)
        if setting.train:
            z.sum().backward()
    return int(counter.get_total_flops())
