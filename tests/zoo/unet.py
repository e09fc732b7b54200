"""A U-Net: a ResNet encodes, and blocks that widen, join what was skipped, and convolve twice decode."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.cifar_resnet import BasicBlock


class Conv2dReLU(nn.Sequential):
    """Convolution, batch norm and ReLU, as a subclass of Sequential that only builds."""

    def __init__(self, in_channels, out_channels, kernel_size, padding=0):
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class Encoder(nn.Module):
    """The features of every scale, finest first."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = nn.Sequential(BasicBlock(width, width), BasicBlock(width, width))
        self.layer2 = nn.Sequential(BasicBlock(width, 2 * width, 2))

    def get_stages(self):
        return [
            nn.Identity(),
            nn.Sequential(self.conv1, self.bn1, self.relu),
            nn.Sequential(self.maxpool, self.layer1),
            self.layer2,
        ]

    def forward(self, x):
        features = [x]
        x = self.relu(self.bn1(self.conv1(x)))
        features.append(x)
        x = self.layer1(self.maxpool(x))
        features.append(x)
        features.append(self.layer2(x))
        return features


class StagedEncoder(Encoder):
    """Makes the sequences of its stages anew at every call, so that its layers are called from elsewhere."""

    def forward(self, x):
        features = []
        for stage in self.get_stages():
            x = stage(x)
            features.append(x)
        return features


class DecoderBlock(nn.Module):
    def __init__(self, in_channels, skip_channels, out_channels):
        super().__init__()
        self.conv1 = Conv2dReLU(in_channels + skip_channels, out_channels, 3, padding=1)
        self.conv2 = Conv2dReLU(out_channels, out_channels, 3, padding=1)

    def forward(self, x, skip=None):
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        x = self.conv1(x)
        x = self.conv2(x)
        return x


class UNet(nn.Module):
    def __init__(self, encoder=Encoder, width=8, num_classes=4):
        super().__init__()
        self.encoder = encoder(width)
        self.blocks = nn.ModuleList(
            [
                DecoderBlock(2 * width, width, width),
                DecoderBlock(width, width, width),
                DecoderBlock(width, 0, width),
            ]
        )
        self.head = nn.Conv2d(width, num_classes, kernel_size=3, padding=1)

    def forward(self, x):
        features = self.encoder(x)[1:][::-1]
        x, skips = features[0], features[1:]
        for i, block in enumerate(self.blocks):
            skip = skips[i] if i < len(skips) else None
            x = block(x, skip)
        return self.head(x)
