"""torchvision's ResNet family: resnet18-152, resnext50/101, wide_resnet50/101."""

from typing import Any

import torch
from torch import Tensor
from torchvision.models import resnet

from ..nn.fused import FusedBasicBlock, FusedBottleneck, FusedStem, pooled, traced
from ..nn.genuine import why_patched
from ..nn.network import network_pass, through


class FusedTorchvisionBasicBlock(FusedBasicBlock, resnet.BasicBlock):
    """torchvision's BasicBlock with a fused forward pass."""

    adds_in_place = True


class FusedTorchvisionBottleneck(FusedBottleneck, resnet.Bottleneck):
    """torchvision's Bottleneck with a fused forward pass."""

    adds_in_place = True


class FusedTorchvisionResNet(FusedStem, resnet.ResNet):
    """torchvision's ResNet with a fused stem; its stages are what their blocks are."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        modules: Any = self
        if traced(x) or why_patched(self.fused_watches) is not None:
            plain: Tensor = super()._forward_impl(x)
            return plain
        with network_pass(self, x):
            x = self.stem(x)
            for stage in (modules.layer1, modules.layer2, modules.layer3, modules.layer4):
                x = through(stage, x)
        x = modules.fc(torch.flatten(pooled(modules.avgpool, x), 1))
        return x


FAMILY = {
    resnet.BasicBlock: FusedTorchvisionBasicBlock,
    resnet.Bottleneck: FusedTorchvisionBottleneck,
    resnet.ResNet: FusedTorchvisionResNet,
}
