"""Networks for CIFAR of chains: VGG, MobileNet, RegNet and ShuffleNet, in the manner of the same repository."""

import torch
from torch import nn
from torch.nn import functional as F


class VGG(nn.Module):
    """Layers are read from a list: a width, or "M" for a pooling."""

    def __init__(self, layout=(8, "M", 12, 12, "M", 16), num_classes=10):
        super().__init__()
        self.features = self._make_layers(layout)
        self.classifier = nn.Linear(layout[-1], num_classes)

    def _make_layers(self, layout):
        layers = []
        in_channels = 3
        for width in layout:
            if width == "M":
                layers += [nn.MaxPool2d(kernel_size=2, stride=2)]
            else:
                layers += [nn.Conv2d(in_channels, width, kernel_size=3, padding=1)]
                layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                in_channels = width
        layers += [nn.AdaptiveAvgPool2d(1)]
        return nn.Sequential(*layers)

    def forward(self, x):
        out = self.features(x)
        out = out.view(out.size(0), -1)
        return self.classifier(out)


class Flattened(nn.Module):
    """Reads the pixels of its last features by `view`, in the order of rows of channels."""

    def __init__(self, width=8, px=16, num_classes=10):
        super().__init__()
        self.features = VGG((width, "M", 12)).features[:-1]
        self.classifier = nn.Linear(12 * (px // 2) ** 2, num_classes)

    def forward(self, x):
        out = self.features(x)
        return self.classifier(out.view(out.shape[0], -1))


class SeparableBlock(nn.Module):
    """A depthwise and a pointwise convolution."""

    def __init__(self, in_planes, out_planes, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, in_planes, 3, stride=stride, padding=1, groups=in_planes, bias=False)
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv2 = nn.Conv2d(in_planes, out_planes, kernel_size=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_planes)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return out


class InvertedResidual(nn.Module):
    """Expands, filters each channel, and narrows without an activation; a sum only where nothing is strided."""

    def __init__(self, in_planes, out_planes, expansion, stride):
        super().__init__()
        self.stride = stride
        planes = expansion * in_planes
        self.conv1 = nn.Conv2d(in_planes, planes, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, groups=planes, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out_planes, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_planes)
        self.shortcut = nn.Sequential()
        if stride == 1 and in_planes != out_planes:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_planes, out_planes, kernel_size=1, bias=False), nn.BatchNorm2d(out_planes)
            )

    def forward(self, x):
        out = F.relu6(self.bn1(self.conv1(x)))
        out = F.relu6(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out = out + self.shortcut(x) if self.stride == 1 else out
        return out


class SqueezeExcitation(nn.Module):
    def __init__(self, in_planes, se_planes):
        super().__init__()
        self.se1 = nn.Conv2d(in_planes, se_planes, kernel_size=1, bias=True)
        self.se2 = nn.Conv2d(se_planes, in_planes, kernel_size=1, bias=True)

    def forward(self, x):
        out = F.adaptive_avg_pool2d(x, (1, 1))
        out = F.relu(self.se1(out))
        out = self.se2(out).sigmoid()
        out = x * out
        return out


class RegNetBlock(nn.Module):
    def __init__(self, w_in, w_out, stride, group_width, bottleneck_ratio, se_ratio):
        super().__init__()
        w_b = round(w_out * bottleneck_ratio)
        self.conv1 = nn.Conv2d(w_in, w_b, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(w_b)
        self.conv2 = nn.Conv2d(w_b, w_b, 3, stride=stride, padding=1, groups=w_b // group_width, bias=False)
        self.bn2 = nn.BatchNorm2d(w_b)
        self.with_se = se_ratio > 0
        if self.with_se:
            self.se = SqueezeExcitation(w_b, round(w_in * se_ratio))
        self.conv3 = nn.Conv2d(w_b, w_out, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(w_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or w_in != w_out:
            self.shortcut = nn.Sequential(nn.Conv2d(w_in, w_out, 1, stride, bias=False), nn.BatchNorm2d(w_out))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        if self.with_se:
            out = self.se(out)
        out = self.bn3(self.conv3(out))
        out += self.shortcut(x)
        out = F.relu(out)
        return out


class ShuffleBlock(nn.Module):
    def __init__(self, groups):
        super().__init__()
        self.groups = groups

    def forward(self, x):
        n, c, h, w = x.size()
        return x.view(n, self.groups, c // self.groups, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)


class ShuffleBottleneck(nn.Module):
    """Strided blocks append their pooled input, others add it."""

    def __init__(self, in_planes, out_planes, stride, groups=2):
        super().__init__()
        self.stride = stride
        mid_planes = out_planes // 2
        self.conv1 = nn.Conv2d(in_planes, mid_planes, kernel_size=1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(mid_planes)
        self.shuffle1 = ShuffleBlock(groups=groups)
        self.conv2 = nn.Conv2d(mid_planes, mid_planes, 3, stride=stride, padding=1, groups=mid_planes, bias=False)
        self.bn2 = nn.BatchNorm2d(mid_planes)
        self.conv3 = nn.Conv2d(mid_planes, out_planes, kernel_size=1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(out_planes)
        self.shortcut = nn.Sequential()
        if stride == 2:
            self.shortcut = nn.Sequential(nn.AvgPool2d(3, stride=2, padding=1))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.shuffle1(out)
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        res = self.shortcut(x)
        return F.relu(torch.cat([out, res], 1)) if self.stride == 2 else F.relu(out + res)


class Blocks(nn.Module):
    """A convolution, a row of blocks, and a classifier."""

    def __init__(self, *blocks, width=8, out_width=16, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layers = nn.Sequential(*blocks)
        self.linear = nn.Linear(out_width, num_classes)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layers(out)
        out = F.adaptive_avg_pool2d(out, (1, 1))
        return self.linear(out.view(out.size(0), -1))


def mobilenet():
    return Blocks(SeparableBlock(8, 16), SeparableBlock(16, 16, 2))


def mobilenet_v2():
    return Blocks(InvertedResidual(8, 12, 1, 1), InvertedResidual(12, 16, 3, 2), InvertedResidual(16, 16, 3, 1))


def regnet(se_ratio):
    return Blocks(RegNetBlock(8, 16, 2, 8, 1, se_ratio), RegNetBlock(16, 16, 1, 8, 1, se_ratio))


def shufflenet():
    return Blocks(ShuffleBottleneck(8, 16, 2), ShuffleBottleneck(24, 24, 1), out_width=24)
