"""The project's blocks: those of `plain` with fused forward passes. `fusedres.unfuse` turns one into the other."""

from . import plain
from .fused import FusedBasicBlock, FusedBottleneck, FusedConvBNAct
from .fused_preact import FusedBNAct, FusedPreAct
from .plain import (
    ActivationBasicBlock,
    ActivationBottleneck,
    DenseBlock,
    DenseLayer,
    DropoutShortcutBlock,
    GatedBlock,
    HighwayBlock,
    NoShortcut,
    ScaledBlock,
    StochasticBlock,
    Transition,
    ZeroPadShortcut,
)


class ConvBNAct(FusedConvBNAct, plain.ConvBNAct):
    __doc__ = plain.ConvBNAct.__doc__


class BasicBlock(FusedBasicBlock, plain.BasicBlock):
    __doc__ = plain.BasicBlock.__doc__


class Bottleneck(FusedBottleneck, plain.Bottleneck):
    __doc__ = plain.Bottleneck.__doc__


class BNAct(FusedBNAct, plain.BNAct):
    __doc__ = plain.BNAct.__doc__


class PreActBasicBlock(FusedPreAct, plain.PreActBasicBlock):
    __doc__ = plain.PreActBasicBlock.__doc__


class PreActBottleneck(FusedPreAct, plain.PreActBottleneck):
    __doc__ = plain.PreActBottleneck.__doc__


__all__ = [
    "ActivationBasicBlock",
    "ActivationBottleneck",
    "BNAct",
    "BasicBlock",
    "Bottleneck",
    "ConvBNAct",
    "DenseBlock",
    "DenseLayer",
    "DropoutShortcutBlock",
    "GatedBlock",
    "HighwayBlock",
    "NoShortcut",
    "PreActBasicBlock",
    "PreActBottleneck",
    "ScaledBlock",
    "StochasticBlock",
    "Transition",
    "ZeroPadShortcut",
]
