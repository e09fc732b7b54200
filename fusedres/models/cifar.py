"""The CIFAR networks of He et al. 2015 (arXiv:1512.03385, section 4.2): 6n + 2 layers, 16/32/64 channels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from fusedres.nn import BasicBlock, plain

__all__ = ["CifarResNet", "cifar_resnet"]

WIDTHS = (16, 32, 64)


class CifarResNet(nn.Module):
    """A 3×3 stem, three stages of basic blocks, each at half the resolution of the last, and a classifier.

    Input (N, in_channels, H, W), output (N, num_classes) logits. The paper's input is 32×32; any size of at
    least 4×4 works, since the stages halve it twice and the pool is global.
    """

    def __init__(
        self,
        blocks_per_stage: int,
        *,
        num_classes: int,
        shortcut: Literal["zero_pad", "projection"],
        in_channels: int,
        block: type[plain.BasicBlock],
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.relu = nn.ReLU(inplace=True)
        stages = []
        channels = WIDTHS[0]
        for width in WIDTHS:
            stage = nn.Sequential()
            for i in range(blocks_per_stage):
                stride = 2 if i == 0 and width != WIDTHS[0] else 1
                kind = "identity" if channels == width and stride == 1 else shortcut
                stage.append(block(channels, width, stride, shortcut=kind))
                channels = width
            stages.append(stage)
        self.layer1, self.layer2, self.layer3 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


def cifar_resnet(
    depth: int,
    *,
    num_classes: int = 10,
    shortcut: Literal["zero_pad", "projection"] = "zero_pad",
    in_channels: int = 3,
    fused: bool = True,
) -> CifarResNet:
    """A CIFAR residual network with `depth` weighted layers: 20, 32, 44, 56, 110 and 1202 in the paper.

    Args:
        depth: 6n + 2 for n ≥ 1 blocks per stage.
        num_classes: width of the classifier.
        shortcut: where the shape changes, "zero_pad" (the paper's option A, no parameters) or "projection"
            (option B, a strided 1×1 convolution with batch norm).
        in_channels: channels of the images.
        fused: build from `fusedres.nn` blocks; otherwise from their plain PyTorch twins. Parameters, their
            names and their initial values under one seed are the same.

    Raises:
        ValueError: an argument is outside the values above.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth must be 6n + 2 with n >= 1 (8, 14, 20, 32, 44, 56, 110, ...), got {depth}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if in_channels < 1:
        raise ValueError(f"in_channels must be at least 1, got {in_channels}")
    if shortcut not in ("zero_pad", "projection"):
        raise ValueError(f"shortcut must be 'zero_pad' or 'projection', got {shortcut!r}")
    return CifarResNet(
        (depth - 2) // 6,
        num_classes=num_classes,
        shortcut=shortcut,
        in_channels=in_channels,
        block=BasicBlock if fused else plain.BasicBlock,
    )
