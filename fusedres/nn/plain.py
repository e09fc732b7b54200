"""Residual blocks in plain PyTorch: the twins that the fused blocks are checked against and unfused to.

Attribute names are torchvision's, so that state dicts fit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.zero_pad_shortcut import zero_pad_shortcut


def conv3x3(in_channels: int, channels: int, stride: int = 1, *, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without bias that keeps the size at stride 1."""
    return nn.Conv2d(in_channels, channels, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False)


def conv1x1(in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias."""
    return nn.Conv2d(in_channels, channels, 1, stride, bias=False)


class ZeroPadShortcut(nn.Module):
    """Option A of He et al. 2015: every ``stride``-th pixel, new channels zero, no parameters.

    Args:
        channels: of the output.
        stride: pixels.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        return zero_pad_shortcut(x, self.channels, (self.stride, self.stride))

    def extra_repr(self) -> str:
        return f"{self.channels}, stride={self.stride}"


def shortcut_module(in_channels: int, channels: int, stride: int, kind: str) -> nn.Module | None:
    """The shortcut of a block: None (identity) where shapes allow, else by ``kind``.

    Raises:
        ValueError: the kind is unknown, or ``"identity"`` where the shapes differ.
    """
    if kind not in ("projection", "zero_pad", "identity"):
        raise ValueError(f"shortcut: expected 'projection', 'zero_pad' or 'identity', got {kind!r}")
    if stride == 1 and in_channels == channels:
        return None
    if kind == "identity":
        raise ValueError(
            f"shortcut: an identity needs stride 1 and equal channels, got stride {stride}, {in_channels} -> {channels}"
        )
    if kind == "zero_pad":
        return ZeroPadShortcut(channels, stride)
    return nn.Sequential(conv1x1(in_channels, channels, stride), nn.BatchNorm2d(channels))


class ConvBNAct(nn.Module):
    """act(bn(conv(x))).

    Args:
        in_channels, channels, kernel_size, stride, padding, dilation, groups, bias: as `torch.nn.Conv2d`; padding
            defaults to half the kernel.
        act: ``"relu"`` or None.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        *,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        act: str | None = "relu",
    ) -> None:
        super().__init__()
        if act not in ("relu", None):
            raise ValueError(f"act: expected 'relu' or None, got {act!r}")
        if padding is None:
            padding = dilation * (kernel_size // 2)
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, stride, padding, dilation, groups, bias)
        self.bn = nn.BatchNorm2d(channels)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return torch.relu_(y) if self.act == "relu" else y


class _ResidualBlock(nn.Module):
    """What the two blocks share: a chain of convolutions, a shortcut, ReLU after the sum."""

    downsample: nn.Module | None
    relu: nn.ReLU

    def _joined(self, out: Tensor, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(out + identity)
        return out


class BasicBlock(_ResidualBlock):
    """Two 3x3 convolutions (He et al. 2015, figure 5 left).

    Args:
        in_channels: of the input.
        channels: of both convolutions.
        stride: of the first.
        shortcut: ``"projection"``, ``"zero_pad"`` or ``"identity"``, where shapes differ.
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1, *, shortcut: str = "projection") -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = shortcut_module(in_channels, channels, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self._joined(self.bn2(self.conv2(out)), x)


class Bottleneck(_ResidualBlock):
    """1x1, 3x3, 1x1 (He et al. 2015, figure 5 right), the stride in the 3x3 (as torchvision's).

    Args:
        in_channels: of the input.
        channels: of the output before expansion; the output has 4 times as many.
        stride: of the 3x3.
        groups, base_width: the 3x3 has int(channels * base_width / 64) * groups channels in groups (ResNeXt, wide).
        dilation: of the 3x3.
        shortcut: ``"projection"``, ``"zero_pad"`` or ``"identity"``, where shapes differ.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        *,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        shortcut: str = "projection",
    ) -> None:
        super().__init__()
        width, out_channels = int(channels * base_width / 64) * groups, channels * self.expansion
        self.conv1 = conv1x1(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride, groups=groups, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut_module(in_channels, out_channels, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self._joined(self.bn3(self.conv3(out)), x)


PLAIN_BLOCKS: Sequence[type[nn.Module]] = (ConvBNAct, BasicBlock, Bottleneck)
