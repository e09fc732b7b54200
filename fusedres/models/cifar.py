"""CIFAR networks with ReLU after the sum: He et al. 2015 (section 4.2), ResNeXt, stochastic depth."""

from __future__ import annotations

from functools import partial
from typing import Literal

from torch import nn

from fusedres.models.imagenet import imagenet_plain
from fusedres.models.network import ResNet, build, check_choice, check_sizes, cifar_depth, library, residual_stages

__all__ = ["cifar_plain", "cifar_resnet", "plain", "resnext", "stochastic_resnet"]

WIDTHS = (16, 32, 64)
SHORTCUTS = ("zero_pad", "projection", "projection_always")


def cifar_stem(in_channels: int, channels: int = WIDTHS[0]) -> nn.Conv2d:
    """The 3x3 convolution that every CIFAR network begins with."""
    return nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)


def cifar_resnet(
    depth: int,
    *,
    num_classes: int = 10,
    shortcut: Literal["zero_pad", "projection", "projection_always"] = "zero_pad",
    zero_init_residual: bool = False,
    in_channels: int = 3,
    fused: bool = True,
) -> ResNet:
    """A CIFAR residual network with `depth` weighted layers: 20, 32, 44, 56, 110 and 1202 in the paper.

    A 3×3 stem and three stages of n basic blocks with 16, 32 and 64 channels. The paper's input is 32×32; any size
    of at least 4×4 works.

    Args:
        depth: 6n + 2 for n ≥ 1 blocks per stage.
        num_classes: width of the classifier.
        shortcut: where the shape changes, "zero_pad" (the paper's option A, no parameters) or "projection"
            (option B, a strided 1×1 convolution with batch norm); "projection_always" (option C) in every block.
        zero_init_residual: set the last gamma of every block to 0 at the start.
        in_channels: channels of the images.
        fused: build from `fusedres.nn` blocks; otherwise from their plain PyTorch twins. Parameters, their
            names and their initial values under one seed are the same.

    Raises:
        ValueError: an argument is outside the values above.
    """
    check_choice("shortcut", shortcut, SHORTCUTS)
    return _basic(depth, num_classes, shortcut, in_channels, fused, zero_init_residual)


def cifar_plain(depth: int, *, num_classes: int = 10, in_channels: int = 3, fused: bool = True) -> ResNet:
    """A CIFAR network without shortcuts, the baseline of He et al. 2015: 20, 32, 44 and 56 layers in the paper.

    Args and errors are those of `cifar_resnet`.
    """
    return _basic(depth, num_classes, "none", in_channels, fused)


def _basic(
    depth: int, num_classes: int, shortcut: str, in_channels: int, fused: bool, zero_init_residual: bool = False
) -> ResNet:
    counts = [cifar_depth(depth, 2)] * 3
    check_sizes(num_classes, in_channels)
    block = library(fused).BasicBlock
    conv1 = cifar_stem(in_channels)
    stages = residual_stages(lambda _, *sizes: block(*sizes, shortcut=shortcut), counts, WIDTHS, WIDTHS[0], 1)
    return build(conv1, stages, num_classes=num_classes, fused=fused, zero_init_residual=zero_init_residual)


def plain(depth: int, *, num_classes: int | None = None, in_channels: int = 3, fused: bool = True) -> ResNet:
    """The plain network of `depth` layers: ImageNet's for 18 and 34, CIFAR's for 6n + 2 (20, 32, 44, 56).

    Args:
        depth: 18, 34 or 6n + 2.
        num_classes: width of the classifier (the data set's if None).
        in_channels, fused: as in `cifar_resnet`.

    Raises:
        ValueError: an argument is outside the values above.
    """
    if depth in (18, 34):
        classes = 1000 if num_classes is None else num_classes
        return imagenet_plain(depth, num_classes=classes, in_channels=in_channels, fused=fused)
    classes = 10 if num_classes is None else num_classes
    return cifar_plain(depth, num_classes=classes, in_channels=in_channels, fused=fused)


def stochastic_resnet(
    depth: int = 110,
    *,
    survival: float = 0.5,
    num_classes: int = 10,
    shortcut: Literal["zero_pad", "projection"] = "zero_pad",
    in_channels: int = 3,
    fused: bool = True,
) -> ResNet:
    """A CIFAR ResNet whose blocks are left out at random in training (Huang et al. 2016, arXiv:1603.09382).

    Args:
        depth: 6n + 2; 110 and 1202 in the paper.
        survival: of the last of L blocks; that of block l is 1 - l / L * (1 - survival), the paper's linear decay.
        num_classes, shortcut, in_channels, fused: as in `cifar_resnet`.

    Raises:
        ValueError: an argument is outside the values above.
    """
    n = cifar_depth(depth, 2)
    check_sizes(num_classes, in_channels)
    check_choice("shortcut", shortcut, SHORTCUTS)
    if not 0 < survival <= 1:
        raise ValueError(f"survival must be a probability above 0, got {survival}")
    block = library(fused).StochasticBlock

    def make(index: int, channels: int, width: int, stride: int) -> nn.Module:
        alive = 1 - (index + 1) / (3 * n) * (1 - survival)
        made: nn.Module = block(channels, width, stride, shortcut=shortcut, survival=alive)
        return made

    conv1 = cifar_stem(in_channels)
    return build(conv1, residual_stages(make, [n] * 3, WIDTHS, WIDTHS[0], 1), num_classes=num_classes, fused=fused)


def resnext(
    depth: int = 29,
    *,
    cardinality: int = 8,
    base_width: int = 64,
    num_classes: int = 10,
    zero_init_residual: bool = False,
    in_channels: int = 3,
    fused: bool = True,
) -> ResNet:
    """A CIFAR ResNeXt (Xie et al. 2017, arXiv:1611.05431): ResNeXt-29, 8x64d and 16x64d in the paper.

    Args:
        depth: 9n + 2.
        cardinality: groups of each 3x3.
        base_width: channels of a group in the first stage; doubled in each later one.
        num_classes, zero_init_residual, in_channels, fused: as in `cifar_resnet`.

    Raises:
        ValueError: an argument is outside the values above.
    """
    n = cifar_depth(depth, 3)
    check_sizes(num_classes, in_channels)
    for name, value in (("cardinality", cardinality), ("base_width", base_width)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    block = partial(library(fused).Bottleneck, groups=cardinality, base_width=base_width)
    conv1 = cifar_stem(in_channels, 64)
    stages = residual_stages(lambda _, *sizes: block(*sizes), [n] * 3, (64, 128, 256), 64, 4)
    return build(conv1, stages, num_classes=num_classes, fused=fused, zero_init_residual=zero_init_residual)
