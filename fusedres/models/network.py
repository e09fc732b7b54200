"""What all networks have in common: the skeleton of a ResNet, its fused form, stages, initial values, checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import SupportsIndex

import torch
from torch import nn

from fusedres.nn import blocks, plain
from fusedres.nn.network import network_pass, through
from fusedres.nn.plain.variants import gated_modules
from fusedres.nn.pooling import global_pool
from fusedres.nn.stem import FusedStem
from fusedres.swap.registry import register_class

__all__ = ["FusedResNet", "ResNet", "build", "cifar_depth", "initialise", "library", "residual_stages"]


class ResNet(nn.Module):
    """A stem, stages layer1, layer2, ..., an optional end, global pooling, a classifier; torchvision's names.

    Input (N, in_channels, H, W), output (N, num_classes) logits. Any size that leaves a pixel to the last stage works.

    Args:
        conv1: the first convolution.
        stages: the blocks of each stage.
        channels: of the last stage's output.
        num_classes: width of the classifier.
        stem_act: whether batch norm and ReLU follow conv1.
        pool: whether a 3x3 max-pooling of stride 2 does.
        end: what stands between the last stage and the pooling, or None.
    """

    def __init__(
        self,
        conv1: nn.Conv2d,
        stages: Sequence[nn.Sequential],
        channels: int,
        *,
        num_classes: int,
        stem_act: bool = True,
        pool: bool = False,
        end: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = conv1
        self.bn1 = nn.BatchNorm2d(conv1.out_channels) if stem_act else None
        self.relu = nn.ReLU(inplace=True) if stem_act else None
        self.maxpool = nn.MaxPool2d(3, 2, 1) if pool else None
        self.stages = tuple(f"layer{i}" for i in range(1, len(stages) + 1))
        for name, stage in zip(self.stages, stages, strict=True):
            self.add_module(name, stage)
        self.end = end
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """What comes before the first stage."""
        for part in (self.conv1, self.bn1, self.relu, self.maxpool):
            x = x if part is None else part(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for name in self.stages:
            x = self.stage(self._modules[name], x)  # type: ignore[arg-type]
        if self.end is not None:
            x = self.end(x)
        logits: torch.Tensor = self.fc(self.pool(x).flatten(1))
        return logits

    def stage(self, stage: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """One stage."""
        z: torch.Tensor = stage(x)
        return z

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """The mean over all pixels."""
        z: torch.Tensor = self.avgpool(x)
        return z


class FusedResNet(FusedStem, ResNet):
    """A `ResNet` with a fused stem; its stages are what their blocks are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_dynamo_compiling():
            return super().forward(x)
        with network_pass(self, x):
            return super().forward(x)

    def stage(self, stage: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return through(stage, x)

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        return global_pool(self.avgpool, x)


register_class(ResNet, FusedResNet)

MakeBlock = Callable[[int, int, int, int], nn.Module]
"""Block number l from its index, input channels, width and stride."""


def residual_stages(
    make: MakeBlock, counts: Sequence[int], widths: Sequence[int], channels: int, expansion: int
) -> tuple[list[nn.Sequential], int]:
    """Stages of ``counts`` blocks, each but the first at half the resolution of the one before, and their channels.

    Args:
        make: builds a block.
        counts: blocks of each stage.
        widths: of each stage, before expansion.
        channels: of the first stage's input.
        expansion: channels of a block's output over its width.
    """
    stages, index = [], 0
    for i_stage, (count, width) in enumerate(zip(counts, widths, strict=True)):
        stage = nn.Sequential()
        for i_block in range(count):
            stride = 2 if i_stage > 0 and i_block == 0 else 1
            stage.append(make(index, channels, width, stride))
            channels = width * expansion
            index += 1
        stages.append(stage)
    return stages, channels


def library(fused: bool) -> ModuleType:
    """Where blocks come from: `fusedres.nn.blocks` or their plain PyTorch twins."""
    return blocks if fused else plain


def build(
    conv1: nn.Conv2d,
    stages: tuple[list[nn.Sequential], int],
    *,
    num_classes: int,
    fused: bool,
    zero_init_residual: bool = False,
    stem_act: bool = True,
    pool: bool = False,
    end: nn.Module | None = None,
) -> ResNet:
    """A `ResNet`, initialised."""
    model = (FusedResNet if fused else ResNet)(
        conv1, *stages, num_classes=num_classes, stem_act=stem_act, pool=pool, end=end
    )
    return initialise(model, zero_init_residual)


def initialise(model: ResNet, zero_init_residual: bool = False) -> ResNet:
    """Normal weights of variance 2 / fan-out (He et al. 2015, arXiv:1502.01852), gates' biases as their blocks say.

    Args:
        model: the network.
        zero_init_residual: set the last gamma of every residual block to 0, so that blocks begin as the identity
            (Goyal et al. 2017, arXiv:1706.02677).

    Raises:
        ValueError: ``zero_init_residual`` of a network whose blocks do not end in a batch norm.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for gated in gated_modules(model):
        gated.reset_gate()
    if zero_init_residual:
        last = [module.last_norm for module in model.modules() if isinstance(module, plain.ResidualBlock)]
        if not last:
            raise ValueError("zero_init_residual: expected False, these blocks do not end in a batch norm; got True")
        for norm in last:
            nn.init.zeros_(norm.weight)
    return model


def check_sizes(num_classes: int, in_channels: int = 3) -> None:
    """Refuse a classifier without classes and images without channels."""
    for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if not isinstance(value, SupportsIndex):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_choice(name: str, value: object, known: Iterable[object]) -> None:
    """Refuse a value that is none of those known."""
    known = tuple(known)
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def cifar_depth(depth: int, layers: int, extra: int = 2) -> int:
    """The n of a network of 3 stages of n blocks, 3 * layers * n + extra layers in all.

    Args:
        depth: the layers that have weights.
        layers: in a block.
        extra: outside of the blocks.
    """
    step = 3 * layers
    if depth < step + extra or (depth - extra) % step:
        first = ", ".join(str(step * n + extra) for n in range(1, 6))
        raise ValueError(f"depth must be {step}n + {extra} with n >= 1 ({first}, ...), got {depth}")
    return (depth - extra) // step
