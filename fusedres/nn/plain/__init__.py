"""Residual blocks in plain PyTorch: the twins that the fused blocks are checked against and unfused to."""

from fusedres.nn.plain.dense import DenseBlock, DenseLayer, Transition
from fusedres.nn.plain.preact import BNAct, PreActBasicBlock, PreActBottleneck
from fusedres.nn.plain.residual import BasicBlock, Bottleneck, ConvBNAct, NoShortcut, ResidualBlock, ZeroPadShortcut
from fusedres.nn.plain.variants import (
    ActivationBasicBlock,
    ActivationBottleneck,
    DropoutShortcutBlock,
    GatedBlock,
    HighwayBlock,
    ScaledBlock,
    StochasticBlock,
)

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
    "ResidualBlock",
    "ScaledBlock",
    "StochasticBlock",
    "Transition",
    "ZeroPadShortcut",
]
