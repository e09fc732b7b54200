"""The classes of batch norms that fused passes compute, and what a live one of them is to a pass.

They are PyTorch's BatchNorm2d and SyncBatchNorm, timm's with an activation of their own (their norm alone), and frozen
ones, whose parameters and statistics are all buffers. Of the latter torchvision, Detectron2, DETR and others have a
class each, so these are told by their name and their buffers, and tried. What derives from one of them has to compute
as it does.
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedres.context import here
from fusedres.nn.patched import watches_of
from fusedres.nn.tensors import NotFusable, tensor_of
from fusedres.operands import Norm, NormNumbers
from fusedres.runtime.collectives import is_one_of_several
from fusedres.runtime.torch_private import in_backward


class NormKind(NamedTuple):
    """How the modules of a class compute.

    ``base`` has the code that a call runs, and runs its children ``behind`` the norm. ``frozen``: it never measures a
    batch. ``eps`` is that of modules without such an attribute.
    """

    base: type[nn.Module]
    frozen: bool = False
    behind: tuple[str, ...] = ()
    eps: float | None = None


# A library is not imported for them: their modules can not be here where it is not.
_TIMM = "timm.layers.norm_act", {"BatchNormAct2d": False, "FrozenBatchNormAct2d": True, "SyncBatchNormAct": False}
_VECTORS = ("weight", "bias", "running_mean", "running_var")
_COUNTER = "num_batches_tracked"
_READ = (*_VECTORS, _COUNTER, "eps", "momentum", "training", "track_running_stats")

_kinds: dict[type, NormKind | None] = {}


def norm_kind(bn: nn.Module) -> NormKind | None:
    """How a module computes, if it is a batch norm of a class that fused passes compute."""
    cls = type(bn)
    if cls not in _kinds:
        kind = next((kind for base in cls.__mro__ if (kind := _of_class(base)) is not None), None)
        if kind is not None and kind.frozen:
            kind = _tried(bn, kind)
        elif any(hasattr(cls, name) for name in _READ):  # properties: parametrizations have them
            kind = None
        _kinds[cls] = kind
    return _kinds[cls]


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm of a class that fused passes compute."""
    return type(module) is nn.BatchNorm2d or norm_kind(module) is not None


def norm_alone(bn: Any, x: Tensor) -> Tensor:
    """What a batch norm gives without what it runs behind it, by its own code."""
    if not behind_norm(bn):
        z: Tensor = bn(x)
        return z
    if isinstance(bn, nn.BatchNorm2d):
        return nn.BatchNorm2d.forward(bn, x)
    if isinstance(bn, nn.SyncBatchNorm):
        return nn.SyncBatchNorm.forward(bn, x)
    scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
    shift = bn.bias - bn.running_mean * scale
    return x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]


def _of_class(cls: type) -> NormKind | None:
    if cls in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return NormKind(cls)
    module, names = _TIMM
    for name, frozen in names.items():
        if getattr(sys.modules.get(module), name, None) is cls:
            return NormKind(cls, frozen, ("drop", "act"))
    return NormKind(cls, frozen=True) if cls.__name__.endswith("FrozenBatchNorm2d") else None


def _tried(bn: nn.Module, kind: NormKind) -> NormKind | None:
    """The kind of a frozen norm if it computes the formula, on a twin of it; with the eps of its code, if that has one.

    Known are 1e-5 (DETR) and 0 (the first Mask R-CNN).
    """
    if bn._parameters or not bn._buffers.keys() >= set(_VECTORS) or not bn._modules.keys() <= set(kind.behind):
        return None
    has_eps = hasattr(bn, "eps")
    for eps in (0.25,) if has_eps else (1e-5, 0.0):
        try:
            if _is_formula(bn, eps, has_eps=has_eps):
                return kind if has_eps else kind._replace(eps=eps)
        except Exception:  # it is somebody else's code, and not what was looked for
            return None
    return None


@torch.inference_mode(False)
@torch.enable_grad()
def _is_formula(bn: Any, eps: float, *, has_eps: bool) -> bool:
    """Whether a twin of other numbers gives (x - mean) / sqrt(var + eps) * weight + bias, in every mode."""
    numbers = torch.arange(1, 14, dtype=torch.float64, device="cpu").sin()
    values = (numbers[:3], numbers[3:6], numbers[6:9], numbers[9:12].square() + 0.5)
    weight, bias, mean, var = (value.view(-1, 1, 1) for value in values)
    twin: Any = object.__new__(type(bn))
    twin.__dict__.update(bn.__dict__)
    twin._buffers = dict(zip(_VECTORS, map(Tensor.clone, values), strict=True))
    twin._modules = {name: nn.Identity() for name in bn._modules}
    if has_eps:
        twin.eps = eps
    x = torch.arange(24, dtype=torch.float64, device="cpu").cos().view(2, 3, 2, 2)
    scale = weight / (var + eps).sqrt()
    for twin.training in (True, False):
        for differentiated in (True, False):
            x = x.detach().requires_grad_(differentiated)
            z = twin.forward(x)
            dx = torch.autograd.grad(z.sum(), x)[0] if differentiated else scale
            found, exact = (z, dx - 0 * x), ((x - mean) * scale + bias, scale + 0 * x)
            if not all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(found, exact, strict=True)):
                return False
    return all(map(torch.equal, twin._buffers.values(), values))


def behind_norm(bn: nn.Module) -> tuple[tuple[str, nn.Module], ...]:
    """What a call of a batch norm runs behind it, in this order: dropout and activation, by their names in it."""
    kind = None if type(bn) is nn.BatchNorm2d else norm_kind(bn)
    if kind is None:
        return ()
    children = ((name, bn._modules.get(name)) for name in kind.behind)
    return tuple((name, child) for name, child in children if child is not None)


def why_not_norm(name: str, bn: nn.Module) -> str | None:
    """Why the norm of a batch norm, without what it runs behind it, can not be fused, or None."""
    reason = None if type(bn) is nn.BatchNorm2d else _why_not_class(name, bn)
    momentum = bn.__dict__.get("momentum")
    if reason is None and momentum is not None and not math.isfinite(momentum):
        reason = f"{name}.momentum is {momentum}"
    return reason


def _why_not_class(name: str, bn: nn.Module) -> str | None:
    cls = type(bn)
    if cls is nn.Identity:  # folded into the convolution
        return f"{name} is an Identity, which is fused in evaluation alone" if bn.training else None
    kind = norm_kind(bn)
    if kind is None:
        return f"{name} is a {cls.__name__}, not a plain BatchNorm2d"
    for _, method, function in watches_of(kind.base):
        if function is None or getattr(cls, method, None) is not function:
            return f"{name} is a {cls.__name__}, which has its own {method}"
    return None


def group_of(bn: nn.Module) -> Any:
    """The processes whose batches a live SyncBatchNorm takes for one in its present mode; None: its own alone.

    Calls that are taken down to be timed are this process's alone.
    """
    if (
        not isinstance(bn, nn.SyncBatchNorm)
        or not bn.training
        or not is_one_of_several()
        or here().gathered is not None
    ):
        return None
    group = bn.process_group or torch.distributed.group.WORLD
    return group if torch.distributed.get_world_size(group) > 1 else None


def norm_of(bn: nn.Module, conv_bias: Tensor | None = None) -> Norm:
    """The tensors and numbers of a live batch norm, as a call in its present mode uses them; none of an Identity.

    ``conv_bias`` is that of the convolution before it. Of a SyncBatchNorm that waits for other processes, a pass that
    activation checkpointing makes once more moves no running statistics.

    Raises:
        NotFusable: a tensor is of a class that computes in its own way, or one that has to be there is missing.
    """
    if type(bn) is nn.Identity:
        return Norm(bias=conv_bias, numbers=NormNumbers(batch_stats=False))
    live: Any = bn
    kind = norm_kind(bn)
    gamma, beta, running_mean, running_var = vectors = [tensor_of(name, bn) for name in _VECTORS]
    if kind is not None and kind.frozen:
        if any(vector is None for vector in vectors):
            raise NotFusable(f"a {type(bn).__name__} has lost a buffer")
        eps = live.eps if kind.eps is None else kind.eps
        numbers = NormNumbers(eps, batch_stats=False)
        return Norm(gamma, beta, running_mean, running_var, conv_bias, numbers=numbers)
    # Only who measures a batch for the running statistics counts it.
    counted = tensor_of(_COUNTER, bn) if live.training and live.track_running_stats else None
    momentum = live.momentum
    if momentum is None:  # a cumulative average: the k-th batch weighs 1 / k
        momentum = 0.0 if counted is None else 1.0 / (float(counted) + 1.0)
    batch_stats = live.training or running_mean is None
    if live.training and not live.track_running_stats:
        running_mean = running_var = None
    group = group_of(bn)
    if group is not None and in_backward():  # a pass that is made once more, of a batch that was counted
        running_mean = running_var = counted = None
    numbers = NormNumbers(live.eps, momentum, batch_stats, group)
    return Norm(gamma, beta, running_mean, running_var, conv_bias, counted, numbers)
