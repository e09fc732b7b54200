"""Trained networks taken apart: blocks without their residual, layers left out, gradients through one way alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

import fusedres
from fusedres.nn import plain
from fusedres.ops.zero_pad_shortcut import zero_pad_shortcut
from fusedres.studies.study import Setting
from fusedres.studies.training import Spec, named

__all__ = ["DissectedBlock", "Part", "blocks_of", "dissected", "plain_copy", "residual_network", "stages_of"]

Part = Literal[
    "whole", "shortcut", "gradient by shortcut", "gradient by residual", "without layer 1", "without layer 2"
]


def residual_network(setting: Setting) -> Spec:
    """The one that is taken apart: of 110 layers in the papers, of 56 on digits."""
    depth = 110 if setting.full else 56
    return named(f"ResNet-{depth}", f"cifar_resnet{depth}")


class DissectedBlock(nn.Module):
    """A residual block or two layers of a plain network, or what `part` leaves of them.

    Attributes:
        part: "shortcut" is the residual block deleted; of the next two the values are those of the whole block, while
            the gradient takes one way only; "without layer ..." is for plain networks, and passes on what the layer is
            given, subsampled and padded with zeros where the layer changes the shape.
    """

    def __init__(self, block: plain.ResidualBlock) -> None:
        super().__init__()
        self.block = block
        self.part: Part = "whole"

    @property
    def keeps_shape(self) -> bool:
        """Whether the shortcut is the identity."""
        return self.block.downsample is None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        block: Any = self.block
        if self.part == "whole":
            whole: torch.Tensor = block(x)
            return whole
        if self.part.startswith("without"):
            return self._one_layer(x)
        shortcut: torch.Tensor = block.shortcut(x)
        if self.part == "shortcut":
            return shortcut.relu()
        residual = block.residual(x)
        if self.part == "gradient by shortcut":
            residual = residual.detach()
        else:
            shortcut = shortcut.detach()
        return (residual + shortcut).relu()

    def _one_layer(self, x: torch.Tensor) -> torch.Tensor:
        block: Any = self.block
        if self.part == "without layer 2":
            first: torch.Tensor = block.bn1(block.conv1(x)).relu()
            return first
        x = zero_pad_shortcut(x, block.conv1.out_channels, block.conv1.stride)
        second: torch.Tensor = block.bn2(block.conv2(x)).relu()
        return second


def stages_of(model: nn.Module) -> Sequence[nn.Sequential]:
    """The stages of a network, each a sequence of blocks."""
    return [child for child in model.children() if isinstance(child, nn.Sequential)]


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of a network without fused passes, in evaluation mode, whose modules' hooks run."""
    return fusedres.unfuse(copy.deepcopy(model)).eval()


def dissected(model: nn.Module) -> nn.Module:
    """A plain copy of a network of residual blocks, in evaluation mode, whose blocks are all `DissectedBlock`.

    Raises:
        ValueError: its stages are not of such blocks.
    """
    copied = plain_copy(model)
    stages = stages_of(copied)
    if not stages or not all(isinstance(block, plain.ResidualBlock) for stage in stages for block in stage):
        raise ValueError(f"model: expected stages of residual blocks, got a {type(model).__name__} without")
    for stage in stages:
        for i, block in enumerate(stage):
            assert isinstance(block, plain.ResidualBlock)
            stage[i] = DissectedBlock(block)
    return copied


def blocks_of(model: nn.Module) -> Sequence[DissectedBlock]:
    """The dissected blocks, from input to output."""
    return [module for module in model.modules() if isinstance(module, DissectedBlock)]
