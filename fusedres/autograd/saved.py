"""Nested tuples of tensors kept for the backward pass, and the refusal of a second derivative."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..autocast import no_autocast
from ..replay import Place, like


class Packed(NamedTuple):
    """Nested tuples of tensors and constants, as what they are made of and a flat tuple of the tensors."""

    structure: "Structure"
    tensors: tuple[Tensor, ...]


class Structure:
    """Nested tuples with a `Place` wherever a tensor stood; hashed once, for it comes with every pass."""

    def __init__(self, nested: Any) -> None:
        self.nested = nested
        self._typed = _typed(nested)
        self._hash = hash(self._typed)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Structure) and self._typed == other._typed)


def _typed(part: Any) -> tuple[Any, ...]:
    """What tells a named tuple from a tuple, and a place from a number."""
    return (type(part), *(map(_typed, part) if isinstance(part, tuple) else (part,)))


def packed(nested: Any) -> Packed:
    """Tensors of nested tuples apart from their structure."""
    tensors: list[Tensor] = []
    return Packed(Structure(_detach(nested, tensors)), tuple(tensors))


def unpacked(pack: Packed) -> Any:
    """The nested tuples given to `packed`; vectors contiguous, whatever hooks of saved tensors made of them."""
    dense = tuple(tensor.contiguous() if tensor.dim() == 1 else tensor for tensor in pack.tensors)
    return _attach(pack.structure.nested, dense)


def keep(ctx: Any, pack: Packed) -> None:
    """Save every tensor through ``ctx.save_for_backward``, so that saved-tensor hooks see it."""
    ctx.structure = pack.structure
    ctx.save_for_backward(*pack.tensors)


def kept(ctx: Any) -> Packed:
    """What was given to `keep`."""
    return Packed(ctx.structure, ctx.saved_tensors)


def _detach(nested: Any, tensors: list[Tensor]) -> Any:
    if isinstance(nested, Tensor):
        tensors.append(nested)
        return Place(len(tensors) - 1)
    return like(nested, [_detach(part, tensors) for part in nested]) if isinstance(nested, tuple) else nested


def _attach(part: Any, tensors: tuple[Tensor, ...]) -> Any:
    if isinstance(part, Place):
        return tensors[part]
    return like(part, [_attach(inner, tensors) for inner in part]) if isinstance(part, tuple) else part


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
        if torch._C._functorch.is_legacy_batchedtensor(grads[0]):
            raise RuntimeError(
                "fusedres: fused blocks take one gradient at a time, not a batch of them (is_grads_batched, "
                "vectorize); call fusedres.unfuse(model) before computing these"
            )
        with backends.resumed(ctx.backend), no_autocast(grads[0].device.type):
            return backward(ctx, *grads)

    return run
