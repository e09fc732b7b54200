"""The pre-activation blocks of He et al. 2016 (arXiv:1603.05027): batch norm and ReLU before each convolution."""

import torch
from torch import Tensor, nn

from fusedres.nn.plain.residual import ZeroPadShortcut, conv1x1, conv3x3, shortcut_module


class BNAct(nn.Module):
    """relu(bn(x)): what follows the last pre-activation block.

    Args:
        channels: of the input.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.bn(x))


class PreActBlock(nn.Module):
    """z = shortcut + conv(relu(bn(... conv1(relu(bn1(x)))))): nothing after the sum.

    An identity or zero-pad shortcut carries x itself; a projection, relu(bn1(x)). Before the first block of a network
    nothing is left to normalise (the stem has done it): it has no bn1 (``preact=False``), which is the paper's "first
    activation before splitting into two paths".
    """

    depth: int
    expansion: int
    bn1: nn.BatchNorm2d | None
    downsample: nn.Module | None
    dropout: nn.Dropout | None
    relu: nn.ReLU

    def _finish(self, in_channels: int, channels: int, stride: int, shortcut: str, dropout: float) -> None:
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a probability below 1, got {dropout}")
        if shortcut == "none":
            raise ValueError("shortcut: a pre-activation block has one, got 'none'")
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.downsample = shortcut_module(in_channels, channels, stride, shortcut, norm=False)

    def forward(self, x: Tensor) -> Tensor:
        u = x if self.bn1 is None else self.relu(self.bn1(x))
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample(x if isinstance(self.downsample, ZeroPadShortcut) else u)
        for i in range(1, self.depth):
            y = getattr(self, f"conv{i}")(u)
            u = self.relu(getattr(self, f"bn{i + 1}")(y))
        if self.dropout is not None:
            u = self.dropout(u)
        z: Tensor = getattr(self, f"conv{self.depth}")(u) + shortcut
        return z


class PreActBasicBlock(PreActBlock):
    """Two 3x3 convolutions, each behind its batch norm and ReLU.

    Args:
        in_channels: of the input.
        channels: of both convolutions.
        stride: of the first.
        shortcut: as in `shortcut_module`; a projection has no batch norm.
        preact: whether there is a bn1 and a ReLU before the first convolution.
        dropout: probability of a value being dropped before the last convolution (Wide ResNet).
    """

    depth = 2
    expansion = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        *,
        shortcut: str = "projection",
        preact: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels) if preact else None
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self._finish(in_channels, channels, stride, shortcut, dropout)


class PreActBottleneck(PreActBlock):
    """1x1, 3x3, 1x1, each behind its batch norm and ReLU, the stride in the 3x3.

    Args:
        in_channels: of the input.
        channels: of the inner convolutions; the output has 4 times as many.
        stride, shortcut, preact, dropout: as in `PreActBasicBlock`.
    """

    depth = 3
    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        *,
        shortcut: str = "projection",
        preact: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.bn1 = nn.BatchNorm2d(in_channels) if preact else None
        self.conv1 = conv1x1(in_channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, out_channels)
        self._finish(in_channels, out_channels, stride, shortcut, dropout)
