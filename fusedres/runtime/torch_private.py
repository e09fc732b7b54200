"""What is used of PyTorch that it does not publish, under names of ours: the one place to mend when a version changes.

Left out are the dictionaries of a module (``_modules``, ``_forward_hooks`` and their like), which every saved model
names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = [
    "COMPILERS_TENSORS",
    "AnyBatchNorm",
    "DispatchMode",
    "arguments_of",
    "clear_saved",
    "constant_to_compilers",
    "convolve",
    "convolve_onto",
    "copy_all",
    "current_node",
    "dispatch_keys",
    "dispatch_modes",
    "end_workers",
    "forward_class",
    "has_hooks",
    "hooks_on_every_module",
    "in_backward",
    "is_batch_of_gradients",
    "is_transformed",
    "lerp_all",
    "saves_by_hooks",
    "storage_id",
    "thread_dispatch",
    "tree_leaves",
    "tree_map_only",
    "unseen_by_modes",
    "version",
]

AnyBatchNorm = _BatchNorm
"""What batch norms of every number of dimensions inherit from."""

DispatchMode = TorchDispatchMode
"""Sees every call of an operator on its thread, below autograd and autocast."""


COMPILERS_TENSORS = (FakeTensor, FunctionalTensor)
"""What stands for tensors where a compiler goes through a program."""


def constant_to_compilers(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a compiler call a method of a module as it is and take the result for a constant.

    As `torch.compiler.assume_constant_result`, which would import the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# Modules.


def hooks_on_every_module() -> bool:
    """Whether a hook waits for the call of every module of the process."""
    return _has_any_global_hook()


def end_workers(batches: torch.utils.data.DataLoader[Any]) -> None:
    """End the worker processes of a loader, if it has any."""
    end = getattr(batches._iterator, "_shutdown_workers", None)
    if end is not None:
        end()


# Autograd and the transforms of functions.


def is_transformed() -> bool:
    """Whether forward-mode differentiation or a transform of `torch.func` is under way on this thread."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def is_batch_of_gradients(tensor: Tensor) -> bool:
    """Whether a gradient is a batch of them, as ``torch.autograd.grad(is_grads_batched=True)`` gives."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor)


current_node: Callable[[], Any] = torch._C._current_autograd_node
"""The node of the graph whose backward pass runs on this thread, or None."""


def in_backward() -> bool:
    """Whether a backward pass calls, on this thread."""
    return torch._C._current_graph_task_id() != -1


def clear_saved(ctx: Any) -> None:
    """Free what a Function's context saved, inside of its backward pass and unless the graph is retained."""
    ctx.maybe_clear_saved_tensors()


def saves_by_hooks() -> bool:
    """Whether what is saved for backward goes through somebody's hooks, as under activation checkpointing."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def forward_class(node: Any) -> Any:
    """The Function that a node of the graph, or a context, belongs to; None for PyTorch's own nodes."""
    return getattr(node, "_forward_cls", None)


def has_hooks(tensor: Tensor) -> bool:
    """Whether somebody waits for the gradient at a tensor."""
    return bool(tensor._backward_hooks)


# Tensors and calls of operators.


def version(tensor: Tensor) -> int:
    """Counts the writes to a tensor's memory; not to be asked of an inference tensor."""
    return tensor._version


def storage_id(tensor: Tensor) -> int:
    """Tells the memories of tensors apart, those of meta tensors included, as long as they live."""
    return tensor.untyped_storage()._cdata


# By themselves, for replays ask them of every tensor and pass.
dispatch_keys: Callable[[Tensor], Any] = torch._C._dispatch_keys
"""What decides where calls on a tensor go, as a set whose ``raw_repr()`` is compared: its device and layout, views
negated or conjugated lazily, wrappers."""

dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
"""How many `DispatchMode` see the calls of this thread."""


unseen_by_modes: Callable[[], AbstractContextManager[Any]] = _disable_current_modes
"""No `DispatchMode` sees the calls inside of the ``with`` block."""


def thread_dispatch() -> tuple[int, int]:
    """What is done with every call on this thread: inference mode, autocast, other people's dispatch modes."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    return included.raw_repr(), excluded.raw_repr()


def arguments_of(operator: Any) -> Iterator[tuple[str, bool, bool]]:
    """Of each argument of an operator: its name, whether it is written to, and whether it is an ``out``."""
    for argument in operator._schema.arguments:
        yield argument.name, argument.alias_info is not None and argument.alias_info.is_write, argument.is_out


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source into its target: in one launch, where all pairs agree in their strides."""
    torch._foreach_copy_(targets, sources)


def lerp_all(moved: list[Tensor], towards: list[Tensor], weight: float) -> None:
    """Move each tensor by ``weight`` of the way towards another, in one call, which no signal comes into."""
    torch._foreach_lerp_(moved, towards, weight)


# oneDNN's convolutions on the CPU, with what joins them. ``arguments``: weight, shift or None, padding, stride,
# dilation, groups.


def convolve(u: Tensor, *arguments: object) -> Tensor:
    """conv(u) + shift; the weight may be in oneDNN's own layout."""
    z: Tensor = torch.ops.mkldnn._convolution_pointwise(u, *arguments, "none", [], "")
    return z


def convolve_onto(total: Tensor, u: Tensor, *arguments: object) -> None:
    """total += conv(u) + shift, in the memory of ``total``."""
    torch.ops.mkldnn._convolution_pointwise_.binary(total, u, *arguments, "add", 1.0, None, [], None)
