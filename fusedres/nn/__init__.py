"""Residual blocks as modules, fused; `fusedres.nn.plain` holds the same in plain PyTorch."""

from . import plain
from .blocks import BasicBlock, Bottleneck, ConvBNAct
from .plain import ZeroPadShortcut

__all__ = ["BasicBlock", "Bottleneck", "ConvBNAct", "ZeroPadShortcut", "plain"]
