"""The ImageNet networks of He et al. 2015 (arXiv:1512.03385, table 1), with torchvision's keys."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from fusedres.models.network import ResNet, build, check_choice, check_sizes, library, residual_stages

__all__ = ["COUNTS", "imagenet_resnet", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]

COUNTS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""Blocks of each stage, by depth."""
WIDTHS = (64, 128, 256, 512)
SHORTCUTS = ("projection", "zero_pad", "projection_always")


def imagenet_stem(in_channels: int, channels: int = 64) -> nn.Conv2d:
    """The 7x7 convolution of stride 2 that every ImageNet network begins with."""
    return nn.Conv2d(in_channels, channels, 7, 2, 3, bias=False)


def imagenet_resnet(
    depth: int,
    *,
    num_classes: int = 1000,
    shortcut: str = "projection",
    stride_in_first: bool = False,
    zero_init_residual: bool = False,
    in_channels: int = 3,
    fused: bool = True,
) -> ResNet:
    """ResNet-18, 34 (basic blocks), 50, 101 or 152 (bottlenecks); torchvision's weights load.

    Args:
        depth: 18, 34, 50, 101 or 152.
        num_classes: width of the classifier.
        shortcut: ``"zero_pad"``, ``"projection"`` or ``"projection_always"``, options A, B and C of the paper; its
            table 1 and torchvision have B.
        stride_in_first: the stride of a bottleneck in its first 1x1, as in the paper ("v1"), not in its 3x3, as
            torchvision's ("v1.5").
        zero_init_residual: set the last gamma of every block to 0 at the start.
        in_channels: channels of the images.
        fused: build from `fusedres.nn` blocks; otherwise from their plain PyTorch twins. Parameters, their names and
            their initial values under one seed are the same.

    Raises:
        ValueError: an argument is outside the values above.
    """
    check_choice("depth", depth, COUNTS)
    check_choice("shortcut", shortcut, SHORTCUTS)
    return _network(
        depth, num_classes, shortcut, stride_in_first, zero_init_residual=zero_init_residual,
        in_channels=in_channels, fused=fused,
    )  # fmt: skip


def imagenet_plain(depth: int, *, num_classes: int = 1000, in_channels: int = 3, fused: bool = True) -> ResNet:
    """plain-18 and plain-34: ResNet-18 and 34 without shortcuts; arguments as `imagenet_resnet`'s.

    Raises:
        ValueError: an argument is outside the values above.
    """
    check_choice("depth", depth, (18, 34))
    return _network(depth, num_classes, "none", False, zero_init_residual=False, in_channels=in_channels, fused=fused)


def _network(
    depth: int, num_classes: int, shortcut: str, stride_in_first: bool, *, zero_init_residual: bool,
    in_channels: int, fused: bool,
) -> ResNet:  # fmt: skip
    check_sizes(num_classes, in_channels)
    blocks = library(fused)
    if depth < 50:
        block, make = blocks.BasicBlock, partial(blocks.BasicBlock, shortcut=shortcut)
    else:
        block = blocks.Bottleneck
        make = partial(block, shortcut=shortcut, stride_in_first=stride_in_first)
    conv1 = imagenet_stem(in_channels)
    stages = residual_stages(lambda _, *sizes: make(*sizes), COUNTS[depth], WIDTHS, 64, block.expansion)
    return build(
        conv1, stages, num_classes=num_classes, fused=fused, zero_init_residual=zero_init_residual, pool=True
    )  # fmt: skip


def resnet18(**options: Any) -> ResNet:
    """ResNet-18; keywords as `imagenet_resnet`'s."""
    return imagenet_resnet(18, **options)


def resnet34(**options: Any) -> ResNet:
    """ResNet-34; keywords as `imagenet_resnet`'s."""
    return imagenet_resnet(34, **options)


def resnet50(**options: Any) -> ResNet:
    """ResNet-50; keywords as `imagenet_resnet`'s."""
    return imagenet_resnet(50, **options)


def resnet101(**options: Any) -> ResNet:
    """ResNet-101; keywords as `imagenet_resnet`'s."""
    return imagenet_resnet(101, **options)


def resnet152(**options: Any) -> ResNet:
    """ResNet-152; keywords as `imagenet_resnet`'s."""
    return imagenet_resnet(152, **options)
