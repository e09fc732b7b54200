"""The network of a program that plays a board game: a tower of residual blocks, and two heads."""

import torch
from torch import nn
from torch.nn import functional as F


class ConvBlock(nn.Module):
    def __init__(self, planes, filters):
        super().__init__()
        self.conv1 = nn.Conv2d(planes, filters, 3, stride=1, padding=1)
        self.bn1 = nn.BatchNorm2d(filters)

    def forward(self, s):
        return F.relu(self.bn1(self.conv1(s)))


class ResBlock(nn.Module):
    def __init__(self, filters):
        super().__init__()
        self.conv1 = nn.Conv2d(filters, filters, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)

    def forward(self, x):
        residual = x
        out = self.conv1(x)
        out = F.relu(self.bn1(out))
        out = self.conv2(out)
        out = self.bn2(out)
        out += residual
        out = F.relu(out)
        return out


class Heads(nn.Module):
    """Logarithms of the probabilities of moves, and who is expected to win."""

    def __init__(self, filters, board, moves):
        super().__init__()
        self.conv_v = nn.Conv2d(filters, 8, kernel_size=1)
        self.bn_v = nn.BatchNorm2d(8)
        self.fc_v1 = nn.Linear(8 * board * board, 16)
        self.fc_v2 = nn.Linear(16, 1)
        self.conv_p = nn.Conv2d(filters, 8, kernel_size=1)
        self.bn_p = nn.BatchNorm2d(8)
        self.fc_p = nn.Linear(8 * board * board, moves)

    def forward(self, s):
        v = F.relu(self.bn_v(self.conv_v(s)))
        v = v.view(v.size(0), -1)
        v = F.relu(self.fc_v1(v))
        v = torch.tanh(self.fc_v2(v))
        p = F.relu(self.bn_p(self.conv_p(s)))
        p = p.flatten(1)
        p = F.log_softmax(self.fc_p(p), dim=1)
        return p, v


class PolicyValueNet(nn.Module):
    """The tower's blocks are attributes of numbered names."""

    def __init__(self, planes=5, filters=12, blocks=3, board=9, moves=82):
        super().__init__()
        self.blocks = blocks
        self.conv = ConvBlock(planes, filters)
        for block in range(blocks):
            setattr(self, f"res_{block}", ResBlock(filters))
        self.heads = Heads(filters, board, moves)

    def forward(self, s):
        s = self.conv(s)
        for block in range(self.blocks):
            s = getattr(self, f"res_{block}")(s)
        return self.heads(s)
