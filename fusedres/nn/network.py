"""The forward pass of a network of fused blocks: what they share, and what one writes and the next alone reads."""

from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from fusedres.nn.ahead import prepare
from fusedres.nn.chain import FusedResidual
from fusedres.nn.fused import Fused, FusedPass
from fusedres.nn.parts import NotFusable
from fusedres.nn.patched import why_overridden, why_patched
from fusedres.nn.tracing import is_traced
from fusedres.runtime.autocast import contraction_dtype
from fusedres.runtime.graphs import is_graphed
from fusedres.runtime.weights import of_network
from fusedres.traffic.bystander import Bystander


def network_pass(network: Fused, x: Tensor) -> AbstractContextManager[None]:
    """Surrounds the forward pass of a network whose own code runs nothing but its modules.

    Under autocast the weights of all its fused blocks are rounded together at its beginning, unless a hook might write
    to them after that. On a GPU, what its first pass launches is compiled before it.
    """

    def weights() -> list[Tensor]:
        found: list[Tensor] = []
        with suppress(NotFusable):
            found += (conv.weight for conv in network.parts_of(network).convs)
        unseen = all(_collect(child, False, found) for child in network._modules.values() if child is not None)
        return found if unseen else []

    if is_graphed(x) or network.goes_plain(x):
        return nullcontext()
    if x.is_cuda:
        prepare(network, x)
    return of_network(x, contraction_dtype(x), weights)


def _collect(module: nn.Module, fused: bool, found: list[Tensor]) -> bool:
    """Add the weights of the convolutions in fused blocks to ``found``; whether no hook looks at a module."""
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        if not isinstance(hook, Bystander):
            return False
    fused = fused or isinstance(module, FusedPass)
    if fused and type(module) is nn.Conv2d and module.weight is not None:
        found.append(module.weight)
    return all(_collect(child, fused, found) for child in module._modules.values() if child is not None)


def through(stage: nn.Module, x: Tensor) -> Tensor:
    """``stage(x)``; fused blocks that follow each other in an `nn.Sequential` hand over to each other.

    Nobody outside sees what is between two neighbours. So the gradient there may pass the ReLU of the first in the last
    pass of the second, with the sums that the first one's batch norm needs. Blocks with hooks hand nothing over and are
    handed nothing: these are shown the gradients that plain blocks have. For the network whose forward calls the stage.
    """
    if torch.compiler.is_dynamo_compiling() or is_graphed(x):
        graphed: Tensor = stage(x)
        return graphed
    chain = type(stage) is nn.Sequential and torch.is_grad_enabled() and not is_traced(x) and not _is_watched(stage)
    if not chain or why_patched(()) is not None:
        z: Tensor = stage(x)
        return z
    modules: list[Any] = list(stage._modules.values())
    unseen = [*map(_takes_part, modules), False]
    for i, module in enumerate(modules):
        x = module(x, hands_over=True) if unseen[i] and unseen[i + 1] else module(x)
    return x


def _takes_part(module: nn.Module) -> bool:
    """Whether a module is a fused block that nobody else looks into."""
    known = isinstance(module, FusedResidual) and type(module).forward is FusedResidual.forward
    return known and not _is_watched(module)


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody waits for the call of a module, or has put something in its place."""
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        if not isinstance(hook, Bystander):
            return True
    if module._backward_hooks or module._backward_pre_hooks or module.__dict__.get("_compiled_call_impl") is not None:
        return True
    return why_overridden("", module) is not None
