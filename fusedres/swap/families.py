"""Which plain class becomes which fused class, one entry per class that can be swapped."""

import sys

from torch import nn

from ..models.densenet import DenseNet, FusedDenseNet
from ..models.network import FusedResNet, ResNet
from ..nn import blocks, plain
from ..nn.fused import Fused

OWN: dict[type[nn.Module], type[Fused]] = {
    plain.ConvBNAct: blocks.ConvBNAct,
    plain.BasicBlock: blocks.BasicBlock,
    plain.Bottleneck: blocks.Bottleneck,
    plain.BNAct: blocks.BNAct,
    plain.PreActBasicBlock: blocks.PreActBasicBlock,
    plain.PreActBottleneck: blocks.PreActBottleneck,
    **{
        getattr(plain, name): getattr(blocks, name)
        for name in (
            "ScaledBlock", "DropoutShortcutBlock", "GatedBlock", "StochasticBlock", "ActivationBasicBlock",
            "ActivationBottleneck", "DenseBlock", "Transition",
        )
    },
    ResNet: FusedResNet,
    DenseNet: FusedDenseNet,
}  # fmt: skip

NOTHING_TO_FUSE: dict[type[nn.Module], str] = {
    plain.HighwayBlock: "a highway block has no batch norm: its two convolutions and its gate run as they are",
}
"""Blocks of the project that have no fused pass, and why; `report` names them."""


def families() -> dict[type[nn.Module], type[Fused]]:
    """Plain class -> fused class, for every library whose models can exist in this process."""
    known: dict[type[nn.Module], type[Fused]] = dict(OWN)
    # A model of a library can only be here if the library is; importing it would cost seconds and may not work.
    if "torchvision.models.resnet" in sys.modules:
        from .torchvision import FAMILY

        known.update(FAMILY)
    if "torchvision.models.densenet" in sys.modules:
        from .torchvision_densenet import FAMILY as DENSE_FAMILY

        known.update(DENSE_FAMILY)
    if "timm.models.resnet" in sys.modules:
        from .timm import FAMILY as TIMM_FAMILY

        known.update(TIMM_FAMILY)
    return known
