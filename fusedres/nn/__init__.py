"""Residual blocks as modules, fused; `fusedres.nn.plain` holds the same in plain PyTorch."""

from typing import TYPE_CHECKING

from fusedres.nn import blocks, plain
from fusedres.nn.blocks import *  # noqa: F403

if not TYPE_CHECKING:
    __all__ = [*blocks.__all__, "plain"]
