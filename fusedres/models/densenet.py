"""DenseNets (Huang et al. 2017, arXiv:1608.06993) for CIFAR and ImageNet; the latter with torchvision's keys."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fusedres.models.cifar import cifar_stem
from fusedres.models.imagenet import imagenet_stem
from fusedres.models.network import check_choice, check_sizes, library
from fusedres.nn.dense import FusedDenseEnds
from fusedres.swap.registry import register_class

__all__ = [
    "DenseNet",
    "densenet",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "imagenet_densenet",
]

COUNTS = {
    121: (6, 12, 24, 16),
    161: (6, 12, 36, 24),
    169: (6, 12, 32, 32),
    201: (6, 12, 48, 32),
    264: (6, 12, 64, 48),
}
"""Layers of each dense block, by depth."""
GROWTH = {161: 48}
"""Channels that a layer adds, by depth; 32 in all others."""


class DenseNet(nn.Module):
    """A stem, dense blocks with transitions between them, batch norm and ReLU, global pooling, a classifier.

    Input (N, in_channels, H, W), output (N, num_classes) logits.
    """

    def __init__(
        self,
        stem: OrderedDict[str, nn.Module],
        channels: int,
        counts: tuple[int, ...],
        *,
        growth: int,
        bottleneck: int | None,
        compression: float,
        dropout: float,
        num_classes: int,
        fused: bool,
    ) -> None:
        super().__init__()
        blocks = library(fused)
        self.features = nn.Sequential(stem)
        for i, count in enumerate(counts, start=1):
            block = blocks.DenseBlock(count, channels, growth, bottleneck=bottleneck, dropout=dropout)
            self.features.add_module(f"denseblock{i}", block)
            channels += count * growth
            if i < len(counts):
                narrowed = int(channels * compression)
                self.features.add_module(f"transition{i}", blocks.Transition(channels, narrowed))
                channels = narrowed
        self.end = f"norm{len(counts) + 1}"
        self.features.add_module(self.end, nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.features(x), inplace=True)
        logits: torch.Tensor = self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class FusedDenseNet(FusedDenseEnds, DenseNet):
    """A `DenseNet` with a fused stem and a fused end; its dense blocks and transitions are what they are."""


register_class(DenseNet, FusedDenseNet)


def densenet(
    depth: int,
    growth: int = 12,
    *,
    bc: bool = False,
    dropout: float = 0.0,
    num_classes: int = 10,
    in_channels: int = 3,
    fused: bool = True,
) -> DenseNet:
    """A CIFAR DenseNet: three dense blocks; 40, 100 (k = 12, 24) and, with ``bc``, 100, 190, 250 in the paper.

    Args:
        depth: 3n + 4, or 6n + 4 with ``bc``, for n layers a block.
        growth: channels that a layer adds (k).
        bc: bottlenecks of 4k channels, transitions that halve the channels, 2k channels (not 16) in the stem.
        dropout: after each convolution but the first (0.2 in the paper without augmentation).
        num_classes, in_channels, fused: as in `fusedres.models.cifar_resnet`.

    Raises:
        ValueError: an argument is outside the values above.
    """
    step = 6 if bc else 3
    if depth < step + 4 or (depth - 4) % step:
        raise ValueError(f"depth must be {step}n + 4 with n >= 1 ({step + 4}, {2 * step + 4}, ...), got {depth}")
    if growth < 1:
        raise ValueError(f"growth must be at least 1, got {growth}")
    check_sizes(num_classes, in_channels)
    channels = 2 * growth if bc else 16
    stem: OrderedDict[str, nn.Module] = OrderedDict(conv0=cifar_stem(in_channels, channels))
    return (FusedDenseNet if fused else DenseNet)(
        stem, channels, ((depth - 4) // step,) * 3, growth=growth, bottleneck=4 if bc else None,
        compression=0.5 if bc else 1.0, dropout=dropout, num_classes=num_classes, fused=fused,
    )  # fmt: skip


def imagenet_densenet(
    depth: int, *, dropout: float = 0.0, num_classes: int = 1000, in_channels: int = 3, fused: bool = True
) -> DenseNet:
    """DenseNet-121, 161, 169, 201 or 264; torchvision's weights load, which has no 264.

    Args:
        depth: 121, 169, 201 or 264 with 32 new channels a layer, or 161 with 48.
        dropout, num_classes, in_channels, fused: as in `densenet`.

    Raises:
        ValueError: an argument is outside the values above.
    """
    check_choice("depth", depth, COUNTS)
    check_sizes(num_classes, in_channels)
    growth = GROWTH.get(depth, 32)
    channels = 2 * growth
    stem: OrderedDict[str, nn.Module] = OrderedDict(
        conv0=imagenet_stem(in_channels, channels),
        norm0=nn.BatchNorm2d(channels),
        relu0=nn.ReLU(inplace=True),
        pool0=nn.MaxPool2d(3, 2, 1),
    )
    return (FusedDenseNet if fused else DenseNet)(
        stem, channels, COUNTS[depth], growth=growth, bottleneck=4, compression=0.5, dropout=dropout,
        num_classes=num_classes, fused=fused,
    )  # fmt: skip


def densenet121(**options: Any) -> DenseNet:
    """DenseNet-121; keywords as `imagenet_densenet`'s."""
    return imagenet_densenet(121, **options)


def densenet161(**options: Any) -> DenseNet:
    """DenseNet-161; keywords as `imagenet_densenet`'s."""
    return imagenet_densenet(161, **options)


def densenet169(**options: Any) -> DenseNet:
    """DenseNet-169; keywords as `imagenet_densenet`'s."""
    return imagenet_densenet(169, **options)


def densenet201(**options: Any) -> DenseNet:
    """DenseNet-201; keywords as `imagenet_densenet`'s."""
    return imagenet_densenet(201, **options)


def densenet264(**options: Any) -> DenseNet:
    """DenseNet-264; keywords as `imagenet_densenet`'s."""
    return imagenet_densenet(264, **options)
