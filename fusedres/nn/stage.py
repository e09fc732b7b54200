"""A stage of fused blocks: what one writes and the next alone reads belongs to both of them."""

from typing import Any

import torch
from torch import Tensor, nn

from .fused import Bystander, FusedBasicBlock, FusedBlock, FusedBottleneck, traced
from .genuine import why_overridden, why_patched


def through(stage: nn.Module, x: Tensor) -> Tensor:
    """``stage(x)``; fused blocks that follow each other in an `nn.Sequential` hand over to each other.

    Nobody outside sees what is between two neighbours. So the gradient there may pass the ReLU of the first in the last
    pass of the second, with the sums that the first one's batch norm needs. Blocks with hooks hand nothing over and are
    handed nothing: these are shown the gradients that plain blocks have. For the network whose forward calls the stage.
    """
    chain = type(stage) is nn.Sequential and torch.is_grad_enabled() and not traced(x) and not _is_watched(stage)
    if not chain or why_patched(()) is not None:
        z: Tensor = stage(x)
        return z
    modules: list[Any] = list(stage._modules.values())
    unseen = [*map(_is_unseen, modules), False]
    for i, module in enumerate(modules):
        x = module(x, hands_over=True) if unseen[i] and unseen[i + 1] else module(x)
    return x


def _is_unseen(module: nn.Module) -> bool:
    """Whether a module is a fused block that nobody else looks into."""
    known = isinstance(module, (FusedBasicBlock, FusedBottleneck)) and type(module).forward is FusedBlock.forward
    return known and not _is_watched(module)


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody waits for the call of a module, or has put something in its place."""
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        if not isinstance(hook, Bystander):
            return True
    return bool(module._backward_hooks or module._backward_pre_hooks) or why_overridden("", module) is not None
