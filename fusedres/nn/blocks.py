"""The project's blocks: those of `plain` with fused forward passes. `fusedres.unfuse` turns one into the other."""

from . import plain
from .fused import FusedBasicBlock, FusedBottleneck, FusedConvBNAct
from .fused_dense import FusedDenseBlock, FusedTransition
from .fused_preact import FusedBNAct, FusedPreAct
from .fused_variants import FusedBeside, FusedGated, FusedOrdered, FusedScaled, FusedStochastic
from .plain import DenseLayer, HighwayBlock, NoShortcut, ZeroPadShortcut


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


class ScaledBlock(FusedScaled, plain.ScaledBlock):
    __doc__ = plain.ScaledBlock.__doc__


class DropoutShortcutBlock(FusedBeside, plain.DropoutShortcutBlock):
    __doc__ = plain.DropoutShortcutBlock.__doc__


class GatedBlock(FusedGated, plain.GatedBlock):
    __doc__ = plain.GatedBlock.__doc__


class StochasticBlock(FusedStochastic, plain.StochasticBlock):
    __doc__ = plain.StochasticBlock.__doc__


class ActivationBasicBlock(FusedOrdered, plain.ActivationBasicBlock):
    __doc__ = plain.ActivationBasicBlock.__doc__


class ActivationBottleneck(FusedOrdered, plain.ActivationBottleneck):
    __doc__ = plain.ActivationBottleneck.__doc__


class DenseBlock(FusedDenseBlock, plain.DenseBlock):
    __doc__ = plain.DenseBlock.__doc__
    dense_layer = plain.DenseLayer


class Transition(FusedTransition, plain.Transition):
    __doc__ = plain.Transition.__doc__


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
