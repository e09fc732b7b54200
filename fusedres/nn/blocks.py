"""The project's blocks: those of `plain` with fused forward passes. `fusedres.unfuse` turns one into the other."""

from . import plain
from .fused import FusedBasicBlock, FusedBottleneck, FusedConvBNAct


class ConvBNAct(FusedConvBNAct, plain.ConvBNAct):
    __doc__ = plain.ConvBNAct.__doc__


class BasicBlock(FusedBasicBlock, plain.BasicBlock):
    __doc__ = plain.BasicBlock.__doc__


class Bottleneck(FusedBottleneck, plain.Bottleneck):
    __doc__ = plain.Bottleneck.__doc__
