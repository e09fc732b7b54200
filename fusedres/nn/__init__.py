"""Residual blocks as modules, fused; `fusedres.nn.plain` holds the same in plain PyTorch."""

from . import plain
from .blocks import (
    ActivationBasicBlock,
    ActivationBottleneck,
    BasicBlock,
    BNAct,
    Bottleneck,
    ConvBNAct,
    DenseBlock,
    DropoutShortcutBlock,
    GatedBlock,
    PreActBasicBlock,
    PreActBottleneck,
    ScaledBlock,
    StochasticBlock,
    Transition,
)
from .plain import DenseLayer, HighwayBlock, NoShortcut, ZeroPadShortcut

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
    "plain",
]
