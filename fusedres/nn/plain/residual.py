"""The blocks of He et al. 2015 (arXiv:1512.03385): ReLU after the sum.

Attribute names are torchvision's, so that state dicts fit.
"""

from torch import Tensor, nn

from fusedres.activation import activation_named, module_of
from fusedres.ops.zero_pad_shortcut import zero_pad_shortcut


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


class NoShortcut(nn.Module):
    """Stands where a plain network, the baseline of the papers, has no shortcut; it is never called."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("a block without a shortcut has nothing to add")


SHORTCUTS = ("projection", "zero_pad", "identity", "projection_always", "none")


def shortcut_module(in_channels: int, channels: int, stride: int, kind: str, *, norm: bool = True) -> nn.Module | None:
    """The shortcut of a block; None is the identity.

    Args:
        in_channels, channels, stride: of the block.
        kind: where shapes differ, ``"zero_pad"`` (option A of He et al. 2015), ``"projection"`` (option B) or
            ``"identity"`` (they may not); ``"projection_always"`` projects everywhere (option C); ``"none"`` leaves
            the shortcut out.
        norm: whether batch norm follows a projection.

    Raises:
        ValueError: the kind is unknown, or ``"identity"`` where the shapes differ.
    """
    if kind not in SHORTCUTS:
        raise ValueError(f"shortcut: expected one of {', '.join(map(repr, SHORTCUTS))}, got {kind!r}")
    if kind == "none":
        return NoShortcut()
    if stride == 1 and in_channels == channels and kind != "projection_always":
        return None
    if kind == "identity":
        raise ValueError(
            f"shortcut: an identity needs stride 1 and equal channels, got stride {stride}, {in_channels} -> {channels}"
        )
    if kind == "zero_pad":
        return ZeroPadShortcut(channels, stride)
    projection = conv1x1(in_channels, channels, stride)
    return nn.Sequential(projection, nn.BatchNorm2d(channels)) if norm else projection


class ConvBNAct(nn.Module):
    """act(bn(conv(x))).

    Args:
        in_channels, channels, kernel_size, stride, padding, dilation, groups, bias: as `torch.nn.Conv2d`; padding
            defaults to half the kernel.
        act: the name of one of `fusedres.activation.NAMED`, or None.
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
        module = module_of(activation_named(act))
        if padding is None:
            padding = dilation * (kernel_size // 2)
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, stride, padding, dilation, groups, bias)
        self.bn = nn.BatchNorm2d(channels)
        self.act = module

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.act(self.bn(self.conv(x)))
        return z


class ResidualBlock(nn.Module):
    """What both blocks share: ``depth`` convolutions conv1, conv2, ... with bn1, bn2, ..., a shortcut, one ReLU."""

    depth: int
    expansion: int
    downsample: nn.Module | None
    relu: nn.ReLU

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The batch norm whose gamma the option ``zero_init_residual`` sets to 0."""
        norm: nn.BatchNorm2d = getattr(self, f"bn{self.depth}")
        return norm

    def residual(self, x: Tensor) -> Tensor:
        """F(x): bn(conv(... relu(bn1(conv1(x))) ...))."""
        for i in range(1, self.depth):
            x = self.relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
        out: Tensor = self.last_norm(getattr(self, f"conv{self.depth}")(x))
        return out

    def shortcut(self, x: Tensor) -> Tensor:
        """What joins F(x)."""
        return x if self.downsample is None else self.downsample(x)

    def forward(self, x: Tensor) -> Tensor:
        out = self.residual(x)
        if not isinstance(self.downsample, NoShortcut):
            out = out + self.shortcut(x)
        z: Tensor = self.relu(out)
        return z


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions (He et al. 2015, figure 5 left).

    Args:
        in_channels: of the input.
        channels: of both convolutions.
        stride: of the first.
        shortcut: as in `shortcut_module`.
    """

    depth = 2
    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1, *, shortcut: str = "projection") -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = shortcut_module(in_channels, channels, stride, shortcut)


class Bottleneck(ResidualBlock):
    """1x1, 3x3, 1x1 (He et al. 2015, figure 5 right).

    Args:
        in_channels: of the input.
        channels: of the output before expansion; the output has 4 times as many.
        stride: of the 3x3.
        groups, base_width: the 3x3 has int(channels * base_width / 64) * groups channels in groups (ResNeXt, wide).
        dilation: of the 3x3.
        shortcut: as in `shortcut_module`.
        stride_in_first: the stride in the first 1x1, as in the paper ("v1"), and not in the 3x3, as torchvision's
            ("v1.5").
    """

    depth = 3
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
        stride_in_first: bool = False,
    ) -> None:
        super().__init__()
        width, out_channels = int(channels * base_width / 64) * groups, channels * self.expansion
        first, second = (stride, 1) if stride_in_first else (1, stride)
        self.conv1 = conv1x1(in_channels, width, first)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, second, groups=groups, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut_module(in_channels, out_channels, stride, shortcut)
