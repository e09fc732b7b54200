"""One residual block of stride 2, with every kind of shortcut. All take (N, 8, H, W) and give (N, 16, H/2, W/2)."""

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """The branch of two convolutions; a subclass says what is added to it."""

    def __init__(self, inp=8, oup=16, stride=2):
        super().__init__()
        self.conv1 = nn.Conv2d(inp, oup, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(oup)
        self.conv2 = nn.Conv2d(oup, oup, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(oup)


class Projection(Block):
    """Its layers are attributes of the block."""

    def __init__(self):
        super().__init__()
        self.conv_shortcut = nn.Conv2d(8, 16, 1, 2, bias=False)
        self.bn_shortcut = nn.BatchNorm2d(16)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.bn_shortcut(self.conv_shortcut(x)))


class ProjectionWithoutNorm(Block):
    def __init__(self):
        super().__init__()
        self.project = nn.Conv2d(8, 16, 1, 2)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.project(x))


class Pooled(Block):
    """As in ResNet-D: averages first, then projects."""

    def __init__(self, pool=None):
        super().__init__()
        pool = pool or nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
        self.downsample = nn.Sequential(pool, nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.downsample(x)
        return F.relu(out)


class PadAndSlice(Block):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return F.relu(out)


class PadAtTheEnd(Block):
    """Slices, and appends zeros that it makes at every call."""

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        x = x[:, :, ::2, ::2]
        return F.relu(torch.cat([x, torch.zeros_like(x)], dim=1) + out)


class PadAndPool(Block):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 4, 4)))


class NormAlone(nn.Module):
    """A shortcut of one batch norm."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(8, 16, 3, 2, 1)
        self.conv, self.bn = nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.bn_identity = nn.BatchNorm2d(16)

    def forward(self, x):
        x = self.first(x)
        return F.relu(self.bn(self.conv(x)) + self.bn_identity(x))


class Reparametrised(nn.Module):
    """RepVGG's block: a 3x3, a 1x1 and an identity, each with a batch norm, are added."""

    def __init__(self):
        super().__init__()
        self.rbr_reduce = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16))
        self.rbr_dense = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16))
        self.rbr_1x1 = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.rbr_identity = nn.BatchNorm2d(16)
        self.nonlinearity = nn.ReLU()

    def forward(self, inputs):
        inputs = self.nonlinearity(self.rbr_reduce(inputs))
        return self.nonlinearity(self.rbr_dense(inputs) + self.rbr_1x1(inputs) + self.rbr_identity(inputs))


class Crosswise(Block):
    """Two outputs of different sums, as where branches of several scales meet."""

    def __init__(self):
        super().__init__()
        self.other = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16))

    def forward(self, x):
        first = F.relu(self.bn1(self.conv1(x)))
        second = self.other(x)
        return torch.cat([F.relu(first + second), F.relu(self.bn2(self.conv2(first)) + second)], 1)


SHORTCUTS = {
    "projection": Projection,
    "projection without norm": ProjectionWithoutNorm,
    "average pool": Pooled,
    "max pool": lambda: Pooled(nn.MaxPool2d(3, 2, 1)),
    "pad and slice": PadAndSlice,
    "pad at the end": PadAtTheEnd,
    "pad and pool": PadAndPool,
    "norm alone": NormAlone,
    "reparametrised": Reparametrised,
    "crosswise": Crosswise,
}
