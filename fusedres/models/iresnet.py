"""Improved residual networks (Duta et al. 2020, arXiv:2004.04989), with the keys of the authors' code."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fusedres.models.imagenet import COUNTS, WIDTHS, imagenet_stem
from fusedres.models.network import ResNet, build, check_choice, check_sizes
from fusedres.nn.plain.residual import conv1x1, conv3x3
from fusedres.swap import fuse

__all__ = ["ImprovedBottleneck", "improved_resnet", "iresnet"]

DEPTHS = (50, 101, 152)


class ImprovedBottleneck(nn.Module):
    """1x1, 3x3, 1x1, whose outer batch norms and ReLUs depend on the block's place in its stage.

    The first block of a stage normalises what it adds, the last normalises and rectifies the sum, and those after the
    first normalise and rectify their input; but the second only rectifies it, since the first has normalised it.

    Args:
        in_channels: of the input.
        channels: of the inner convolutions; the output has 4 times as many.
        first, last: the block's place in its stage.
        bn0: whether batch norm precedes the ReLU that a block which is not the first begins with.
    """

    expansion = 4

    def __init__(
        self, in_channels: int, channels: int, *, first: bool = False, last: bool = False, bn0: bool = False
    ) -> None:
        super().__init__()
        out_channels, stride = channels * self.expansion, 2 if first else 1
        self.first, self.last = first, last
        self.bn0 = nn.BatchNorm2d(in_channels) if bn0 else None
        self.conv1 = conv1x1(in_channels, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels) if first or last else None
        self.relu = nn.ReLU()
        # Max-pooling, where a strided projection would leave out three of four pixels.
        self.downsample = (
            nn.Sequential(nn.MaxPool2d(3, stride, 1), conv1x1(in_channels, out_channels), nn.BatchNorm2d(out_channels))
            if first
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        out = x
        if not self.first:
            out = self.relu(x if self.bn0 is None else self.bn0(x))
        out = self.relu(self.bn1(self.conv1(out)))
        out = self.conv3(self.relu(self.bn2(self.conv2(out))))
        if self.first and self.bn3 is not None:
            out = self.bn3(out)
        out = out + (x if self.downsample is None else self.downsample(x))
        if self.last and self.bn3 is not None:
            out = self.relu(self.bn3(out))
        return out


def improved_resnet(
    counts: Sequence[int],
    widths: Sequence[int],
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    fused: bool = True,
) -> ResNet:
    """A stem without max-pooling, and stages each of which halves the resolution and has at least two blocks.

    Args:
        counts: blocks of each stage.
        widths: of each stage, before expansion.
        num_classes, in_channels, fused: as in `fusedres.models.resnet50`.
    """
    check_sizes(num_classes, in_channels)
    stages, channels = [], 64
    for count, width in zip(counts, widths, strict=True):
        stage = nn.Sequential()
        for i in range(count):
            stage.append(ImprovedBottleneck(channels, width, first=i == 0, last=i == count - 1, bn0=i > 1))
            channels = width * ImprovedBottleneck.expansion
        stages.append(stage)
    model = build(imagenet_stem(in_channels), (stages, channels), num_classes=num_classes, fused=False)
    return fuse(model) if fused else model


def iresnet(depth: int, *, num_classes: int = 1000, in_channels: int = 3, fused: bool = True) -> ResNet:
    """iResNet-50, 101 or 152; the authors' weights have its keys.

    Args:
        depth: 50, 101 or 152.
        num_classes: width of the classifier.
        in_channels: channels of the images.
        fused: fuse it. Parameters, their names and their initial values under one seed are the same.

    Raises:
        ValueError: an argument is outside the values above.
    """
    check_choice("depth", depth, DEPTHS)
    return improved_resnet(
        COUNTS[depth], WIDTHS, num_classes=num_classes, in_channels=in_channels, fused=fused
    )  # fmt: skip
