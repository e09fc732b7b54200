"""One residual block with something between its layers that is no layer of ours. All keep (N, 8, H, W)."""

import torch
from torch import nn
from torch.nn import functional as F


class SqueezeExcite(nn.Module):
    """Weighs channels by two linear layers of their means."""

    def __init__(self, channel, reduction=4):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channel // reduction, channel, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)


class EfficientChannelAttention(nn.Module):
    """The same by one convolution along the channels."""

    def __init__(self, k_size=3):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv = nn.Conv1d(1, 1, kernel_size=k_size, padding=(k_size - 1) // 2, bias=False)

    def forward(self, x):
        y = self.avg_pool(x)
        y = self.conv(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * torch.sigmoid(y).expand_as(x)


class SpatialAttention(nn.Module):
    """Weighs pixels by a convolution, with a batch norm, of the mean and the largest of their channels."""

    def __init__(self, kernel_size=7):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(1)

    def forward(self, x):
        pooled = torch.cat((torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)), dim=1)
        return x * torch.sigmoid(self.bn(self.conv(pooled)))


class BlurPool(nn.Module):
    """A fixed binomial filter of every channel, reflected at the edges."""

    def __init__(self, channels, stride=1):
        super().__init__()
        self.stride, self.channels = stride, channels
        line = torch.tensor([1.0, 2.0, 1.0])
        kernel = line[:, None] * line[None, :]
        self.register_buffer("filt", (kernel / kernel.sum())[None, None].repeat(channels, 1, 1, 1))

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.filt, stride=self.stride, groups=x.shape[1])


class DropPath(nn.Module):
    """Leaves out the branch of some images of a batch."""

    def __init__(self, drop_prob=0.5):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep_prob = 1 - self.drop_prob
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        random_tensor = x.new_empty(shape).bernoulli_(keep_prob)
        return x.div(keep_prob) * random_tensor


class SelfAttention(nn.Module):
    """Every pixel attends to all of them."""

    def __init__(self, channels, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = self.qkv(x).reshape(b, 3, self.heads, c // self.heads, h * w).transpose(-1, -2).unbind(1)
        return F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(b, c, h, w)


class Between(nn.Module):
    """``inner`` acts between the two convolutions, ``outer`` on the branch before the sum."""

    def __init__(self, inner=None, outer=None, width=8):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.inner = inner or nn.Identity()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.outer = outer or nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        identity = x
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.inner(x)
        x = self.bn2(self.conv2(x))
        x = self.outer(x)
        x += identity
        return self.relu(x)


BETWEEN = {
    "squeeze and excite": lambda: Between(outer=SqueezeExcite(8)),
    "efficient channel attention": lambda: Between(outer=EfficientChannelAttention()),
    "spatial attention": lambda: Between(outer=SpatialAttention()),
    "both attentions": lambda: Between(outer=nn.Sequential(SqueezeExcite(8), SpatialAttention())),
    "self-attention": lambda: Between(inner=SelfAttention(8)),
    "blur pool": lambda: Between(inner=BlurPool(8)),
    "dropout": lambda: Between(inner=nn.Dropout(0.3)),
    "dropout of channels": lambda: Between(inner=nn.Dropout2d(0.3)),
    "dropout of branches": lambda: Between(outer=DropPath(0.5)),
    "dropout in place": lambda: Between(outer=nn.Dropout(0.3, inplace=True)),
}
