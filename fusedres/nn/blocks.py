"""The project's blocks: those of `plain` with fused forward passes. `fusedres.unfuse` turns one into the other."""

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from fusedres.nn import plain
from fusedres.nn.chain import BlockParts, FusedBlock, FusedResidual, conv_bn_act_parts, residual_parts
from fusedres.nn.dense import FusedDenseBlock, FusedTransition, dense_block_parts
from fusedres.nn.fused import Fused, PartsFunction, fused_type
from fusedres.nn.preact import FusedBNAct, FusedPreAct
from fusedres.nn.variants import FusedBeside, FusedGated, FusedOrdered, FusedScaled, FusedStochastic

if TYPE_CHECKING:  # a fused block is a plain one whose forward computes the same
    from fusedres.nn.plain import *  # noqa: F403


def _residual_parts(block: Any) -> BlockParts:
    return residual_parts(block, block.depth)


# What computes a block, and takes it apart in a way of its own.
_PASSES: dict[type[nn.Module], tuple[type[Fused], PartsFunction | None]] = {
    plain.ConvBNAct: (FusedBlock, conv_bn_act_parts),
    plain.BasicBlock: (FusedResidual, _residual_parts),
    plain.Bottleneck: (FusedResidual, _residual_parts),
    plain.BNAct: (FusedBNAct, None),
    plain.PreActBasicBlock: (FusedPreAct, None),
    plain.PreActBottleneck: (FusedPreAct, None),
    plain.ScaledBlock: (FusedScaled, None),
    plain.DropoutShortcutBlock: (FusedBeside, None),
    plain.GatedBlock: (FusedGated, None),
    plain.StochasticBlock: (FusedStochastic, None),
    plain.ActivationBasicBlock: (FusedOrdered, None),
    plain.ActivationBottleneck: (FusedOrdered, None),
    plain.DenseBlock: (FusedDenseBlock, partial(dense_block_parts, kind=plain.DenseLayer)),
    plain.Transition: (FusedTransition, None),
}

FUSED: dict[type[nn.Module], type[Fused]] = {
    block: fused_type(mixin, block, parts, name=block.__name__, __module__=__name__, __qualname__=block.__name__)
    for block, (mixin, parts) in _PASSES.items()
}
"""Plain block -> fused block."""

if not TYPE_CHECKING:
    __all__ = [name for name in plain.__all__ if name != "ResidualBlock"]
    globals().update({name: FUSED.get(getattr(plain, name), getattr(plain, name)) for name in __all__})
