"""Residual blocks taken apart: without their residual, without their shortcut, or with gradients through one alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from fusedres.nn.plain import NoShortcut
from fusedres.train.network import build

__all__ = ["DissectedBlock", "Part", "blocks_of", "dissected_resnet"]

Part = Literal["whole", "shortcut", "residual", "gradient by shortcut", "gradient by residual"]


class DissectedBlock(nn.Module):
    """relu(residual(x) + shortcut(x)) of a basic block, or what `part` leaves of it.

    Attributes:
        part: "shortcut" is the block deleted; "residual" is a block of a plain network; of the last two the values
            are those of the whole block, while the gradient takes one way only.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.part: Part = "whole"

    @property
    def keeps_shape(self) -> bool:
        """Whether the shortcut is the identity."""
        return self.block.downsample is None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        block: Any = self.block
        shortcut = x if block.downsample is None else block.downsample(x)
        if self.part == "shortcut":
            return shortcut.relu()
        residual = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
        if self.part == "residual":
            return residual.relu()
        if self.part == "gradient by shortcut":
            residual = residual.detach()
        elif self.part == "gradient by residual":
            shortcut = shortcut.detach()
        return (residual + shortcut).relu()


def dissected_resnet(name: str, *, classes: int = 10, channels: int = 1, part: Part = "whole") -> nn.Module:
    """A CIFAR residual network by name whose blocks are all `DissectedBlock`, each as ``part`` says.

    Raises:
        ValueError: the network has no basic blocks in its stages, or these have no shortcuts.
    """
    model = build(name, classes=classes, channels=channels, fused=False).model
    stages = [child for child in model.children() if isinstance(child, nn.Sequential)]
    for stage in stages:
        for i, block in enumerate(stage):
            parts = {child for child, _ in block.named_children()} - {"relu", "downsample"}
            if parts != {"conv1", "bn1", "conv2", "bn2"} or not hasattr(block, "downsample"):
                raise ValueError(f"model: expected a network of basic blocks such as cifar_resnet20, got {name!r}")
            if isinstance(block.downsample, NoShortcut):
                raise ValueError(f"model: expected a network with shortcuts such as cifar_resnet20, got {name!r}")
            dissected = DissectedBlock(block)
            dissected.part = part
            stage[i] = dissected
    if not stages:
        raise ValueError(f"model: expected a network of basic blocks such as cifar_resnet20, got {name!r}")
    return model


def blocks_of(model: nn.Module) -> Sequence[DissectedBlock]:
    """The dissected blocks, from input to output."""
    return [module for module in model.modules() if isinstance(module, DissectedBlock)]
