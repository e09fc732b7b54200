"""Networks of pre-activation blocks (He et al. 2016, arXiv:1603.05027) and Wide ResNets."""

from __future__ import annotations

from functools import partial
from typing import Literal

from torch import nn

from fusedres.models.cifar import SHORTCUTS, WIDTHS, cifar_stem
from fusedres.models.imagenet import COUNTS, imagenet_stem
from fusedres.models.imagenet import SHORTCUTS as IMAGENET_SHORTCUTS
from fusedres.models.imagenet import WIDTHS as IMAGENET_WIDTHS
from fusedres.models.network import (
    MakeBlock,
    ResNet,
    build,
    check_choice,
    check_sizes,
    cifar_depth,
    library,
    residual_stages,
)

__all__ = ["imagenet_preact_resnet", "preact_resnet", "wide_resnet"]

PREACT_COUNTS = {**COUNTS, 200: (3, 24, 36, 3)}


def _preact_blocks(fused: bool, bottleneck: bool, shortcut: str) -> tuple[MakeBlock, int]:
    """What builds the blocks, and their expansion; the stem has activated the first one's input."""
    block = library(fused).PreActBottleneck if bottleneck else library(fused).PreActBasicBlock

    def make(index: int, channels: int, width: int, stride: int) -> nn.Module:
        made: nn.Module = block(channels, width, stride, shortcut=shortcut, preact=index > 0)
        return made

    return make, block.expansion


def preact_resnet(
    depth: int,
    *,
    block: Literal["basic", "bottleneck"] | None = None,
    num_classes: int | None = None,
    shortcut: Literal["zero_pad", "projection"] | None = None,
    in_channels: int = 3,
    fused: bool = True,
) -> ResNet:
    """The pre-activation network of `depth` layers: CIFAR's (110, 164 and 1001 in the paper), ImageNet's for 200.

    Args:
        depth: 6n + 2 of basic blocks, 9n + 2 of bottlenecks, or 200 (`imagenet_preact_resnet`).
        block: "basic" or "bottleneck"; None is "basic" up to 110 layers, where the depth allows it.
        num_classes: width of the classifier (the data set's if None).
        shortcut: "zero_pad" or "projection" where the shape changes; None is the first for basic blocks and the
            second for bottlenecks, as in the paper's code.
        in_channels: channels of the images.
        fused: build from `fusedres.nn` blocks; otherwise from their plain PyTorch twins.

    Raises:
        ValueError: an argument is outside the values above.
    """
    if depth == 200 and block is None:
        return imagenet_preact_resnet(
            200, num_classes=1000 if num_classes is None else num_classes, shortcut=shortcut or "projection",
            in_channels=in_channels, fused=fused,
        )  # fmt: skip
    check_choice("block", block, ("basic", "bottleneck", None))
    bottleneck = block == "bottleneck" or (block is None and (depth > 110 or (depth - 2) % 6 != 0))
    n = cifar_depth(depth, 3 if bottleneck else 2)
    shortcut = shortcut or ("projection" if bottleneck else "zero_pad")
    check_choice("shortcut", shortcut, SHORTCUTS)
    classes = 10 if num_classes is None else num_classes
    check_sizes(classes, in_channels)
    make, expansion = _preact_blocks(fused, bottleneck, shortcut)
    conv1 = cifar_stem(in_channels)
    stages = residual_stages(make, [n] * 3, WIDTHS, WIDTHS[0], expansion)
    return build(conv1, stages, num_classes=classes, fused=fused, end=library(fused).BNAct(stages[1]))


def imagenet_preact_resnet(
    depth: int,
    *,
    num_classes: int = 1000,
    shortcut: str = "projection",
    in_channels: int = 3,
    fused: bool = True,
) -> ResNet:
    """Pre-activation ResNet-18 to 152 and 200 for ImageNet.

    Args:
        depth: 18, 34 (basic blocks), 50, 101, 152 or 200 (bottlenecks).
        num_classes, shortcut, in_channels, fused: as in `fusedres.models.resnet50`.

    Raises:
        ValueError: an argument is outside the values above.
    """
    check_choice("depth", depth, PREACT_COUNTS)
    check_choice("shortcut", shortcut, IMAGENET_SHORTCUTS)
    check_sizes(num_classes, in_channels)
    make, expansion = _preact_blocks(fused, depth >= 50, shortcut)
    conv1 = imagenet_stem(in_channels)
    stages = residual_stages(make, PREACT_COUNTS[depth], IMAGENET_WIDTHS, 64, expansion)
    return build(
        conv1, stages, num_classes=num_classes, fused=fused, pool=True, end=library(fused).BNAct(stages[1])
    )  # fmt: skip


def wide_resnet(
    depth: int,
    width: int,
    *,
    dropout: float = 0.0,
    num_classes: int = 10,
    in_channels: int = 3,
    fused: bool = True,
) -> ResNet:
    """A CIFAR Wide ResNet (Zagoruyko and Komodakis 2016, arXiv:1605.07146): WRN-28-10, WRN-40-4, ...

    Args:
        depth: 6n + 4.
        width: channels in units of 16 in the first stage.
        dropout: before each block's last convolution (0.3 in the paper where it is used).
        num_classes, in_channels, fused: as in `preact_resnet`.

    Raises:
        ValueError: an argument is outside the values above.
    """
    n = cifar_depth(depth, 2, extra=4)
    check_sizes(num_classes, in_channels)
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    block = partial(library(fused).PreActBasicBlock, dropout=dropout)
    conv1 = cifar_stem(in_channels)
    widths = [16 * width, 32 * width, 64 * width]
    stages = residual_stages(lambda _, *sizes: block(*sizes), [n] * 3, widths, 16, 1)
    return build(
        conv1, stages, num_classes=num_classes, fused=fused, stem_act=False, end=library(fused).BNAct(stages[1])
    )  # fmt: skip
