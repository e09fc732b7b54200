"""The blocks of DenseNet (Huang et al. 2017, arXiv:1608.06993), with torchvision's names."""

import torch
from torch import Tensor, nn

from fusedres.nn.plain.residual import conv1x1, conv3x3


class DenseLayer(nn.Module):
    """``growth`` new channels from all those before: conv3x3(relu(bn(x))), or with a 1x1 bottleneck before it.

    Args:
        in_channels: of the input.
        growth: channels of the output (k in the paper).
        bottleneck: channels of the 1x1 in units of ``growth`` (4 in DenseNet-BC), or None for no bottleneck.
        dropout: probability of a new value being dropped.
    """

    def __init__(self, in_channels: int, growth: int, *, bottleneck: int | None = 4, dropout: float = 0.0) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a probability below 1, got {dropout}")
        width = in_channels if bottleneck is None else bottleneck * growth
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        if bottleneck is None:
            self.conv1 = conv3x3(in_channels, growth)
        else:
            self.conv1 = conv1x1(in_channels, width)
            self.norm2 = nn.BatchNorm2d(width)
            self.relu2 = nn.ReLU(inplace=True)
            self.conv2 = conv3x3(width, growth)
        self.drop_rate = float(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv1(self.relu1(self.norm1(x)))
        if "conv2" in self._modules:
            y = self.conv2(self.relu2(self.norm2(y)))
        return nn.functional.dropout(y, self.drop_rate, self.training) if self.drop_rate else y


class DenseBlock(nn.ModuleDict):
    """Layers each of which takes the input and the outputs of all layers before it, side by side.

    Args:
        layers: how many.
        in_channels: of the input; the output has ``layers * growth`` more.
        growth, bottleneck, dropout: of each `DenseLayer`.
    """

    def __init__(
        self, layers: int, in_channels: int, growth: int, *, bottleneck: int | None = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        for i in range(layers):
            layer = DenseLayer(in_channels + i * growth, growth, bottleneck=bottleneck, dropout=dropout)
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class Transition(nn.Sequential):
    """Between two dense blocks: batch norm, ReLU, a 1x1 convolution, 2x2 average pooling.

    Args:
        in_channels, channels: of the convolution.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv = conv1x1(in_channels, channels)
        self.pool = nn.AvgPool2d(2, 2)
