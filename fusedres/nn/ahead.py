"""What a network's step launches, gone through on paper before it runs, so that it is compiled in parallel."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from fusedres.context import here
from fusedres.nn.patched import why_patched
from fusedres.plan.gpus import Gpu
from fusedres.runtime.ahead import compile_missing, is_wanted
from fusedres.runtime.autocast import contraction_dtype
from fusedres.runtime.call import gpu_of
from fusedres.runtime.launch import Launch, target_name
from fusedres.traffic.bystander import Bystander
from fusedres.traffic.meta_autocast import meta_autocast
from fusedres.traffic.predict import on_paper
from fusedres.traffic.tensors import tensors_in

# A block that is there in every second pass is missed in one of 256 cases.
DRAWS = 8


def launches_of(network: nn.Module, images: Tensor, gpu: Gpu, *, autocast: torch.dtype | None = None) -> list[Launch]:
    """Every kernel that a pass of a network launches on a GPU, and where autograd is on its backward pass too.

    A pass that draws random numbers is gone through several times: blocks may be left out by them. Nobody else's draws
    change.

    Args:
        network: fused, on the meta device, in the mode that it is to run in.
        images: (N, C, H, W), on the meta device.
        gpu: that need not be here.
        autocast: what it convolves in, if another dtype than its own.
    """

    def step() -> None:
        with meta_autocast(autocast):
            outputs = [output for output in tensors_in(network(images)) if output.requires_grad]
        torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])

    found: list[Launch] = []
    with torch.random.fork_rng(devices=[]):
        for _ in range(DRAWS):
            before = torch.get_rng_state()
            found += (one for one in on_paper(step, gpu) if isinstance(one, Launch))
            if torch.equal(before, torch.get_rng_state()):
                break
    return found


def paper_copy(network: nn.Module) -> nn.Module:
    """A network with the same modules and settings, whose parameters and buffers are on the meta device."""
    memo: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        paper = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        if isinstance(tensor, nn.Parameter):
            paper = nn.Parameter(paper, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = paper
    return copy.deepcopy(network, memo)


# A program that changes its shapes without end is not held up each time.
MOST_KINDS = 16


def prepare(network: Any, x: Tensor) -> None:
    """Compile what the pass of a fused network that begins now launches, and its backward pass, if the cache lacks it.

    The network knows all of its blocks, so that all of their binaries are compiled at once; blocks of another model are
    prepared one by one (`patterns.choose`). Once for each kind of pass. What can not be gone through on paper, as where
    a hook looks at values, is compiled as it is launched.

    Args:
        network: whose forward runs on ``x``.
        x: (N, C, H, W).
    """
    if not is_wanted(x.device):
        return
    known: tuple[Any, ...] = network.fused_prepared
    dtype = contraction_dtype(x)
    kind = x.shape, x.stride(), x.dtype, dtype, network.training, torch.is_grad_enabled()
    if kind in known or len(known) >= MOST_KINDS or here().gathered is not None:
        return
    network.__dict__["fused_prepared"] = (*known, kind)
    gpu = gpu_of(x)
    if gpu.target != target_name(x.get_device()) or not _can_be_copied(network):
        return
    with suppress(Exception):
        paper = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        autocast = dtype if dtype != x.dtype else None
        launches = launches_of(paper_copy(network), paper.requires_grad_(x.requires_grad), gpu, autocast=autocast)
        compile_missing([launch.binary for launch in launches], gpu.target)


def _can_be_copied(network: nn.Module) -> bool:
    """Whether a copy of a network computes alike, and nobody notices."""
    plain = all(type(one) in (Tensor, nn.Parameter) for one in (*network.parameters(), *network.buffers()))
    # A batch norm that waits for other processes would wait for ever.
    alone = not any(isinstance(module, nn.SyncBatchNorm) for module in network.modules())
    return plain and alone and why_patched(()) is None and not any(map(_is_seen, network.modules()))


def _is_seen(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(not isinstance(hook, Bystander) for each in hooks for hook in each.values())
