"""A stage of fused blocks: what one writes and the next alone reads belongs to both of them."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .fused import FusedBasicBlock, FusedBlock, FusedBottleneck, traced, twin_of_class


class FusedStage(nn.Sequential):
    """An `nn.Sequential` in which fused blocks hand over to each other.

    Nobody outside sees what is between two neighbours. So the gradient there may pass the ReLU of the first in the last
    pass of the second, with the sums that the first one's batch norm needs. Blocks with hooks hand nothing over and are
    handed nothing: these are shown the gradients that plain blocks have.
    """

    def forward(self, input: Any) -> Any:
        if traced(input) or not torch.is_grad_enabled():
            return super().forward(input)
        modules: list[Any] = list(self)
        for module, following in zip(modules, [*modules[1:], None], strict=True):
            hands_over = _is_unseen(module) and _is_unseen(following)
            input = module(input, hands_over=True) if hands_over else module(input)
        return input

    def __prepare_scriptable__(self) -> nn.Module:
        return twin_of_class(self, nn.Sequential)


class Bystander:
    """A forward hook that neither keeps nor changes what it is shown: blocks hand over as if it were not there."""

    def __init__(self, hook: Callable[..., None]) -> None:
        self.hook = hook

    def __call__(self, *shown: Any) -> None:
        self.hook(*shown)


def _is_block(module: nn.Module | None) -> bool:
    return isinstance(module, (FusedBasicBlock, FusedBottleneck)) and type(module).forward is FusedBlock.forward


def _is_unseen(module: nn.Module | None) -> bool:
    """Whether a module is a fused block that nobody else looks into."""
    if module is None or not _is_block(module) or "forward" in module.__dict__:
        return False
    forward = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    others = [hook for hook in forward if not isinstance(hook, Bystander)]
    return not (others or module._backward_hooks or module._backward_pre_hooks)


def fuse_stages(model: nn.Module) -> None:
    """Make a `FusedStage` of every plain `nn.Sequential` in which two fused blocks are neighbours."""
    for module in model.modules():
        if type(module) is nn.Sequential and "forward" not in module.__dict__:
            known = [_is_block(child) for child in module]
            if any(a and b for a, b in itertools.pairwise(known)):
                live: Any = module
                live.__class__ = FusedStage


def unfuse_stages(model: nn.Module) -> None:
    """Make a plain `nn.Sequential` of every `FusedStage`."""
    for module in model.modules():
        if type(module) is FusedStage:
            live: Any = module
            live.__class__ = nn.Sequential
