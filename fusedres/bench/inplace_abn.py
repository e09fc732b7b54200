"""inplace_abn's batch norms in torchvision's blocks: they keep only their output, and invert it in backward.

The library has no ReLU (it can not be inverted), so that its networks compute a leaky one. They are gated against plain
networks with the same leaky ReLU, and their rows say so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SLOPE", "leaky", "why_unavailable", "with_inplace_abn"]

SLOPE = 0.01


def why_unavailable(device: torch.device) -> str | None:
    """Why it can not run on ``device``, or None."""
    if importlib.util.find_spec("inplace_abn") is None:
        return "not installed: pip install inplace-abn (it compiles CUDA code)"
    return None if device.type == "cuda" else "inplace_abn is compiled for GPUs"


def leaky(model: nn.Module) -> nn.Module:
    """Turn every ReLU module into a leaky one. In place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.LeakyReLU(SLOPE))
    return model


class AbnBlock(nn.Module):
    """A BasicBlock or Bottleneck whose batch norms and inner activations are inplace_abn's; names stay."""

    def __init__(self, block: Any, norm: Callable[[nn.BatchNorm2d, str], nn.Module]) -> None:
        super().__init__()
        self.last = 3 if hasattr(block, "conv3") else 2
        for i in range(1, self.last + 1):
            setattr(self, f"conv{i}", getattr(block, f"conv{i}"))
            setattr(self, f"bn{i}", norm(getattr(block, f"bn{i}"), "identity" if i == self.last else "leaky_relu"))
        self.downsample = block.downsample
        if self.downsample is not None:
            self.downsample[1] = norm(block.downsample[1], "identity")

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        for i in range(1, self.last + 1):
            x = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x))
        # Not in place: inplace_abn's backward needs its output as it left it.
        return F.leaky_relu(x + shortcut, SLOPE)


def _norm(bn: nn.BatchNorm2d, activation: str) -> nn.Module:
    from inplace_abn import InPlaceABN

    abn: nn.Module = InPlaceABN(
        bn.num_features, eps=bn.eps, momentum=bn.momentum, activation=activation, activation_param=SLOPE
    )
    abn.load_state_dict(bn.state_dict(), strict=False)
    return abn.to(bn.weight.device)


def with_inplace_abn(model: nn.Module, norm: Callable[[nn.BatchNorm2d, str], nn.Module] = _norm) -> nn.Module:
    """Replace torchvision's blocks and stem by inplace_abn's. In place, but for a block itself.

    Raises:
        ValueError: the model holds none of torchvision's blocks.
    """
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    if isinstance(model, (BasicBlock, Bottleneck)):
        return AbnBlock(model, norm)
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (BasicBlock, Bottleneck)):
                setattr(parent, name, AbnBlock(child, norm))
                count += 1
    if not count:
        raise ValueError("model: expected torchvision's residual blocks, got a network without any")
    if isinstance(model, ResNet):
        stem: Any = model
        stem.bn1, stem.relu = norm(model.bn1, "leaky_relu"), nn.Identity()
    return model
