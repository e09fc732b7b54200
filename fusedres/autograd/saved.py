"""Nested tuples of tensors kept for the backward pass, and the refusal of a second derivative."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..autocast import no_autocast
from ..writes import count_backward


def keep(ctx: Any, structure: Any) -> None:
    """Save every tensor of a nested tuple through ``ctx.save_for_backward``, so that saved-tensor hooks see it."""
    tensors: list[Tensor] = []
    ctx.structure = _detach(structure, tensors)
    ctx.save_for_backward(*tensors)


def kept(ctx: Any) -> Any:
    """The nested tuple given to `keep`."""
    return _attach(ctx.structure, ctx.saved_tensors)


class _Slot(int):
    """Stands where a tensor stood: its place among the saved ones."""


def _rebuild(structure: tuple[Any, ...], parts: list[Any]) -> Any:
    return type(structure)(*parts) if hasattr(structure, "_fields") else tuple(parts)


def _detach(structure: Any, tensors: list[Tensor]) -> Any:
    if isinstance(structure, Tensor):
        tensors.append(structure)
        return _Slot(len(tensors) - 1)
    if isinstance(structure, tuple):
        return _rebuild(structure, [_detach(part, tensors) for part in structure])
    return structure


def _attach(structure: Any, tensors: tuple[Tensor, ...]) -> Any:
    if isinstance(structure, _Slot):
        return tensors[structure]
    if isinstance(structure, tuple):
        return _rebuild(structure, [_attach(part, tensors) for part in structure])
    return structure


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A Function's backward, run without autograd; differentiating what it returns raises a RuntimeError.

    Refused under ``create_graph=True`` whatever the arriving gradient requires: what is returned depends on the
    parameters too, and torch's own ``once_differentiable`` drops that dependence in silence.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Tensor) -> Any:
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return outputs
        refuse = torch._C._functions.DelayedError(
            b"fusedres: the backward pass of a fused block has no derivative; "
            b"call fusedres.unfuse(model) before computing second derivatives",
            len(outputs),
        )
        # Each gradient leaves as a fresh tensor tied to the refusal, so that first derivatives stay usable.
        return refuse(*[g.detach().requires_grad_() if isinstance(g, Tensor) else g for g in outputs])

    return once


def on_forward_backend(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A Function's backward, run on ``ctx.backend`` and outside autocast, on whichever thread it is called.

    Without a gradient, as a Function that has none materialised may be called, it has none for anybody.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        if grads[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        count_backward()
        with backends.backend(ctx.backend), no_autocast(grads[0].device.type):
            return backward(ctx, *grads)

    return run
