"""Which plain class becomes which fused class, one entry per class that can be swapped."""

import sys

from torch import nn

from ..models.network import FusedResNet, ResNet
from ..nn import blocks, plain

OWN: dict[type[nn.Module], type[nn.Module]] = {
    plain.ConvBNAct: blocks.ConvBNAct,
    plain.BasicBlock: blocks.BasicBlock,
    plain.Bottleneck: blocks.Bottleneck,
    plain.BNAct: blocks.BNAct,
    plain.PreActBasicBlock: blocks.PreActBasicBlock,
    plain.PreActBottleneck: blocks.PreActBottleneck,
    ResNet: FusedResNet,
}


def families() -> dict[type[nn.Module], type[nn.Module]]:
    """Plain class -> fused class, for every library whose models can exist in this process."""
    known: dict[type[nn.Module], type[nn.Module]] = dict(OWN)
    # A model of a library can only be here if the library is; importing it would cost seconds and may not work.
    if "torchvision.models.resnet" in sys.modules:
        from .torchvision import FAMILY

        known.update(FAMILY)
    return known
