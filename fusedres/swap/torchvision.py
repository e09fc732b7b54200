"""torchvision's ResNet family: resnet18-152, resnext50/101, wide_resnet50/101."""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet

from ..autograd import GlobalPool
from ..nn.fused import FusedBasicBlock, FusedBottleneck, FusedStem, traced
from ..nn.parts import why_not_others


class FusedTorchvisionBasicBlock(FusedBasicBlock, resnet.BasicBlock):
    """torchvision's BasicBlock with a fused forward pass."""


class FusedTorchvisionBottleneck(FusedBottleneck, resnet.Bottleneck):
    """torchvision's Bottleneck with a fused forward pass."""


class FusedTorchvisionResNet(FusedStem, resnet.ResNet):
    """torchvision's ResNet with a fused stem; its stages are what their blocks are."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        modules: Any = self
        x = self.stem(x)
        x = modules.layer4(modules.layer3(modules.layer2(modules.layer1(x))))
        x = modules.fc(torch.flatten(_pooled(modules.avgpool, x), 1))
        return x


def _pooled(pool: nn.Module, x: Tensor) -> Tensor:
    """pool(x); of a plain global pool, with a gradient that the last block reads as it is."""
    plain = type(pool) is nn.AdaptiveAvgPool2d and pool.output_size in (1, (1, 1))
    if plain and not traced(x) and why_not_others([("avgpool", pool)]) is None:
        z: Tensor = GlobalPool.apply(x)
        return z
    pooled: Tensor = pool(x)
    return pooled


FAMILY = {
    resnet.BasicBlock: FusedTorchvisionBasicBlock,
    resnet.Bottleneck: FusedTorchvisionBottleneck,
    resnet.ResNet: FusedTorchvisionResNet,
}
