"""One residual block, with its sums and activations in every spelling. All take and give (N, 8, H, W)."""

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """Its layers; a subclass says how they are called."""

    def __init__(self, width=8):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.relu_ = nn.ReLU(inplace=True)


class Plus(Block):
    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class ShortcutFirst(Block):
    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class PlusInPlace(Block):
    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class TorchAdd(Block):
    def forward(self, x):
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(torch.add(self.bn2(self.conv2(out)), x))


class AddMethod(Block):
    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).add(x).relu()


class AddInPlaceMethod(Block):
    def forward(self, x):
        out = self.bn1(self.conv1(x)).relu_()
        out = self.bn2(self.conv2(out))
        out.add_(x)
        out.relu_()
        return out


class FunctionsInPlace(Block):
    def forward(self, x):
        out = torch.relu_(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)).add_(x)
        return F.relu_(out)


class FunctionalInPlace(Block):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out)) + x
        return F.relu(out, True)


class ModuleInPlace(Block):
    """One activation module, called twice, writes over its input."""

    def forward(self, x):
        identity = x
        out = self.relu_(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu_(out)


class ClampedBelow(Block):
    """A ReLU that is not called one."""

    def forward(self, x):
        out = self.bn1(self.conv1(x)).clamp(min=0)
        return (self.bn2(self.conv2(out)) + x).clamp(min=0)


class ScaledSum(Block):
    """Only a part of the branch is added: the batch norm is fused, the sum is not a plain one."""

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(torch.add(x, self.bn2(self.conv2(out)), alpha=0.5))


class SumOfThree(Block):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + out + self.bn2(self.conv2(out)))


class NothingAfterTheSum(Block):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return x + self.bn2(self.conv2(out))


class SumBeforeBatchNorm(Block):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out) + x))


class InParts(Block):
    """The forward pass in methods of its own."""

    def _first(self, x):
        return F.relu(self.bn1(self.conv1(x)))

    def _second(self, x):
        return self.bn2(self.conv2(x))

    def forward(self, x):
        return F.relu(self._second(self._first(x)) + x)


class Listed(nn.Module):
    """Layers in a list, run in a loop."""

    def __init__(self, width=8, depth=3):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(depth))

    def forward(self, x):
        out = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            out = norm(conv(out))
            if i + 1 < len(self.convs):
                out = F.relu(out)
        return F.relu(out + x)


class ByName(nn.Module):
    """Layers in a dictionary, and others under numbered names."""

    def __init__(self, width=8):
        super().__init__()
        self.layers = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, padding=1), "norm": nn.BatchNorm2d(width)})
        self.add_module("conv_1", nn.Conv2d(width, width, 1))
        self.add_module("norm_1", nn.BatchNorm2d(width))

    def forward(self, x):
        out = F.relu(self.layers["norm"](self.layers["conv"](x)))
        return F.relu(getattr(self, "norm_1")(getattr(self, "conv_1")(out)) + x)  # noqa: B009


class Branch(nn.Module):
    """The residual branch as one Sequential, and a shortcut that is None where nothing changes shape."""

    def __init__(self, inp=8, oup=8, stride=1):
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(inp, oup, 3, stride, 1, bias=False),
            nn.BatchNorm2d(oup),
            nn.ReLU(inplace=True),
            nn.Conv2d(oup, oup, 3, 1, 1, bias=False),
            nn.BatchNorm2d(oup),
        )
        self.downsample = None
        if stride != 1 or inp != oup:
            self.downsample = nn.Sequential(nn.Conv2d(inp, oup, 1, stride, bias=False), nn.BatchNorm2d(oup))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        return F.relu(self.residual(x) + identity, inplace=True)


SPELLINGS = {
    cls.__name__: cls
    for cls in (
        Plus, ShortcutFirst, PlusInPlace, TorchAdd, AddMethod, AddInPlaceMethod, FunctionsInPlace, FunctionalInPlace,
        ModuleInPlace, ClampedBelow, ScaledSum, SumOfThree, NothingAfterTheSum, SumBeforeBatchNorm,
        InParts, Listed, ByName, Branch,
    )
}  # fmt: skip
