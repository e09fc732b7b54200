"""What a module is to whoever reads the forward of the module that has it."""

from __future__ import annotations

from enum import Enum
from typing import Any

from torch import nn

from fusedres.activation import activation_of
from fusedres.nn.fused import Fused, plain_base
from fusedres.nn.norms import is_norm


class Kind(Enum):
    """Layers of which fused passes are made, and everything else."""

    CONV = "convolution"
    NORM = "batch norm"
    ACT = "activation"
    IDLE = "nothing, in some modes"
    OTHER = "something else"


_IDLE = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Dropout1d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def kind_of(module: nn.Module) -> Kind:
    """What a module is."""
    cls = type(module)
    if issubclass(cls, nn.Conv2d):
        return Kind.CONV
    if is_norm(module):
        return Kind.NORM
    if cls in _IDLE:
        return Kind.IDLE
    if activation_of(module) is not None:
        return Kind.ACT
    return Kind.OTHER


def is_idle(module: nn.Module, training: bool) -> bool:
    """Whether one of `Kind.IDLE` gives what it is given."""
    dropout: Any = module
    return type(module) is nn.Identity or not training or dropout.p == 0


def idle_facts(module: nn.Module, training: bool) -> dict[str, Any]:
    """What that depends on."""
    dropout: Any = module
    return {"training": training, **({} if type(module) is nn.Identity else {"p": dropout.p})}


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or the one that it had before it was fused."""
    cls = type(module)
    return (plain_base(cls) or cls) if issubclass(cls, Fused) else cls


def holds_norms(module: nn.Module) -> bool:
    """Whether a batch norm is below a module."""
    return any(is_norm(inner) for inner in module.modules() if inner is not module)


def is_depthwise(conv: Any) -> bool:
    """Whether each channel is a group of its own: these convolutions stay the library's."""
    return bool(conv.groups == conv.in_channels and conv.groups > 1)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's own, and no sequence."""
    cls = plain_type(module)
    return cls.__module__.startswith("torch.nn") and cls is not nn.Sequential
