"""torchvision's ResNet family: resnet18-152, resnext50/101, wide_resnet50/101."""

import torch
from torch import Tensor
from torchvision.models import resnet

from ..nn.fused import FusedBasicBlock, FusedBottleneck, FusedStem


class FusedTorchvisionBasicBlock(FusedBasicBlock, resnet.BasicBlock):
    """torchvision's BasicBlock with a fused forward pass."""


class FusedTorchvisionBottleneck(FusedBottleneck, resnet.Bottleneck):
    """torchvision's Bottleneck with a fused forward pass."""


class FusedTorchvisionResNet(FusedStem, resnet.ResNet):
    """torchvision's ResNet with a fused stem; its stages are what their blocks are."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.fc(torch.flatten(self.avgpool(x), 1))
        return x


FAMILY = {
    resnet.BasicBlock: FusedTorchvisionBasicBlock,
    resnet.Bottleneck: FusedTorchvisionBottleneck,
    resnet.ResNet: FusedTorchvisionResNet,
}
