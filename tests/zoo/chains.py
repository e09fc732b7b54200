"""Chains without a residual sum: heads of segmentation and detection networks, a feature pyramid, a U-Net's double
convolution, an encoder with transposed convolutions, and mobile blocks."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F


class FCNHead(nn.Sequential):
    def __init__(self, in_channels=8, channels=6):
        inter_channels = in_channels * 2
        super().__init__(
            nn.Conv2d(in_channels, inter_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(inter_channels),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(inter_channels, channels, 1),
        )


class PyramidPooling(nn.Module):
    """Context of several sizes, beside the features."""

    def __init__(self, in_dim=8, reduction_dim=8, bins=(2, 3)):
        super().__init__()
        self.features = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(bin),
                nn.Conv2d(in_dim, reduction_dim, kernel_size=1, bias=False),
                nn.BatchNorm2d(reduction_dim),
                nn.ReLU(inplace=True),
            )
            for bin in bins
        )

    def forward(self, x):
        out = [x]
        for f in self.features:
            out.append(F.interpolate(f(x), x.shape[2:], mode="bilinear", align_corners=True))
        return torch.cat(out, 1)


class FPN(nn.Module):
    """A pyramid of features: lateral convolutions, a way down by addition, and a smoothing convolution per level."""

    def __init__(self, in_channels=(8, 12, 16), out_channels=8):
        super().__init__()
        self.stem = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
            for i, o in zip((3, *in_channels), in_channels, strict=False)
        )
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)) for i in in_channels
        )
        self.smooth = nn.ModuleList(
            nn.Sequential(OrderedDict(conv=nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                                      norm=nn.BatchNorm2d(out_channels)))
            for _ in in_channels
        )  # fmt: skip

    def forward(self, x):
        features = []
        for stage in self.stem:
            x = stage(x)
            features.append(x)
        inner = self.lateral[-1](features[-1])
        results = [self.smooth[-1](inner)]
        for i in range(len(features) - 2, -1, -1):
            lateral = self.lateral[i](features[i])
            inner = lateral + F.interpolate(inner, size=lateral.shape[-2:], mode="nearest")
            results.insert(0, self.smooth[i](inner))
        return OrderedDict((str(i), result) for i, result in enumerate(results))


class SharedTower(nn.Module):
    """A detection head: the same tower, and the same predictors, read every level."""

    def __init__(self, width=8, num_convs=2, classes=5):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        tower = []
        for _ in range(num_convs):
            tower += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.tower = nn.Sequential(*tower)
        self.logits = nn.Conv2d(width, classes, 3, padding=1)
        self.box = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        logits, boxes = [], []
        for level in (x, F.max_pool2d(x, 2), F.max_pool2d(x, 4)):
            level = self.tower(level)
            logits.append(self.logits(level))
            boxes.append(F.relu(self.box(level)))
        return logits, boxes


class DoubleConv(nn.Module):
    """Twice convolution, batch norm and ReLU."""

    def __init__(self, in_channels=8, out_channels=12):
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x):
        return self.double_conv(x)


class Widening(nn.Module):
    """A transposed convolution, whose batch norm and ReLU are one pass."""

    def __init__(self, width=8):
        super().__init__()
        self.up = nn.ConvTranspose2d(width, width, 4, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.conv = DoubleConv(2 * width, width)

    def forward(self, x):
        up = F.relu(self.norm(self.up(x)))
        return self.conv(torch.cat([F.interpolate(x, scale_factor=2), up], 1))


class ConvBNReLU6(nn.Sequential):
    def __init__(self, in_planes, out_planes, kernel_size=3, stride=1, groups=1):
        padding = (kernel_size - 1) // 2
        super().__init__(
            nn.Conv2d(in_planes, out_planes, kernel_size, stride, padding, groups=groups, bias=False),
            nn.BatchNorm2d(out_planes),
            nn.ReLU6(inplace=True),
        )


class InvertedResidual(nn.Module):
    """A mobile block as one Sequential, added to its input where it keeps the shape."""

    def __init__(self, inp=8, oup=8, stride=1, expand_ratio=2):
        super().__init__()
        hidden_dim = inp * expand_ratio
        self.use_res_connect = stride == 1 and inp == oup
        layers = []
        if expand_ratio != 1:
            layers.append(ConvBNReLU6(inp, hidden_dim, kernel_size=1))
        layers += [
            ConvBNReLU6(hidden_dim, hidden_dim, stride=stride, groups=hidden_dim),
            nn.Conv2d(hidden_dim, oup, 1, bias=False),
            nn.BatchNorm2d(oup),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x):
        if self.use_res_connect:
            return x + self.conv(x)
        else:
            return self.conv(x)


def activated(act):
    """A chain whose activation is this one."""
    return nn.Sequential(
        nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), act, nn.Conv2d(12, 8, 1), nn.BatchNorm2d(8)
    )


CHAINS = {
    "FCN head": FCNHead,
    "pyramid pooling": PyramidPooling,
    "double convolution": DoubleConv,
    "widening": Widening,
    "inverted residual": InvertedResidual,
    "inverted residual, strided": lambda: InvertedResidual(8, 12, 2),
    "inverted residual, not expanded": lambda: InvertedResidual(8, 8, 1, 1),
    **{
        type(act).__name__: lambda act=act: activated(act)
        for act in (nn.ReLU6(), nn.LeakyReLU(0.1), nn.PReLU(12), nn.PReLU(), nn.SiLU(), nn.Hardswish(), nn.GELU())
    },
    "GELU of tanh": lambda: activated(nn.GELU(approximate="tanh")),
    "identity": lambda: activated(nn.Identity()),
}


def normalised(norm, width=8):
    """A block whose batch norms are of this kind."""
    return nn.Sequential(nn.Conv2d(8, width, 3, padding=1), norm(width), nn.ReLU(), nn.Conv2d(width, 8, 1), norm(8))


def statistics_of_the_batch(width):
    return nn.BatchNorm2d(width, track_running_stats=False)


def without_affine(width):
    return nn.BatchNorm2d(width, affine=False)


def cumulative(width):
    return nn.BatchNorm2d(width, momentum=None)


class FrozenBatchNorm2d(nn.Module):
    """Four buffers, none of which is trained, in the form of detection libraries."""

    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features) - eps)
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x):
        if x.requires_grad:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            bias = self.bias - self.running_mean * scale
            scale = scale.reshape(1, -1, 1, 1)
            bias = bias.reshape(1, -1, 1, 1)
            out_dtype = x.dtype
            return x * scale.to(out_dtype) + bias.to(out_dtype)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


def trained(norm):
    """With statistics and an affine map that do something."""
    for name, low, high in (("weight", -1, 2), ("bias", 1, -1), ("running_mean", -2, 1), ("running_var", 0.5, 3)):
        getattr(norm, name).copy_(torch.linspace(low, high, len(norm.weight)))
    return norm


def frozen_of_torchvision(width):
    return trained(pytest.importorskip("torchvision").ops.FrozenBatchNorm2d(width))


def frozen_of_detection(width):
    return trained(FrozenBatchNorm2d(width))


NORMS = {
    "statistics of the batch": lambda: normalised(statistics_of_the_batch),
    "without affine": lambda: normalised(without_affine),
    "cumulative": lambda: normalised(cumulative),
    "frozen, of torchvision": lambda: normalised(frozen_of_torchvision),
    "frozen, of detection": lambda: normalised(frozen_of_detection),
}
