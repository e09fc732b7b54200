"""Nested tuples of tensors kept for the backward pass."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres.runtime import fallback
from fusedres.runtime.notes import Place, like
from fusedres.runtime.torch_private import clear_saved


class Packed(NamedTuple):
    """Nested tuples of tensors and constants, as what they are made of and a flat tuple of the tensors."""

    structure: "Structure"
    tensors: tuple[Tensor, ...]


class Given(NamedTuple):
    """What a backward pass is told of the inputs that it gives gradients of."""

    dtype: torch.dtype
    size: tuple[int, ...]
    residual_dtype: torch.dtype | None
    asked: tuple[bool, ...]

    @property
    def needed_x(self) -> bool:
        return self.asked[0]

    @property
    def needed_residual(self) -> bool:
        return self.asked[1]

    @property
    def tensors(self) -> tuple[bool, ...]:
        """Which gradients of the tensors are asked for."""
        return self.asked[3:]


class Structure:
    """Nested tuples with a `Place` wherever a tensor stood; hashed once, for it comes with every pass."""

    def __init__(self, nested: Any) -> None:
        self.nested = nested

    @functools.cached_property
    def _typed(self) -> Any:
        return _typed(self.nested)

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self._typed)  # not before it is asked for: a compiler's sizes have none

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Structure) and self._typed == other._typed)


def _typed(part: Any) -> tuple[Any, ...]:
    """What tells a named tuple from a tuple, and a place from a number."""
    return (type(part), *(map(_typed, part) if isinstance(part, tuple) else (part,)))


def pack(nested: Any) -> Packed:
    """Tensors of nested tuples apart from their structure."""
    tensors: list[Tensor] = []
    return Packed(Structure(_detach(nested, tensors)), tuple(tensors))


def unpack(pack: Packed) -> Any:
    """The nested tuples given to `pack`; vectors contiguous, whatever hooks of saved tensors made of them."""
    dense = tuple(tensor.contiguous() if tensor.dim() == 1 else tensor for tensor in pack.tensors)
    return _attach(pack.structure.nested, dense)


class Anchor(torch.autograd.Function):
    """Zeros of the size of x, one element in memory; their gradient is that of x.

    Added to a copy of x, they attach it to the graph of x, which itself need not be kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return x.new_zeros(1).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None) -> Tensor | None:
        return dz


def keep(ctx: Any, pack: Packed, *inputs: Tensor | None, summands: Sequence[Tensor | None] = ()) -> None:
    """Save every tensor through ``ctx.save_for_backward``, so that saved-tensor hooks see it.

    ``inputs`` are those that `attached` is to give back; each or a copy of it is among the tensors. Of ``summands``
    there is none: zeros stand for them, attached to their graph.
    """
    tensors = pack.tensors
    ctx.structure, ctx.count, ctx.unpacked = pack.structure, len(tensors), None
    ctx.owner = fallback.owner()
    ctx.anchored = [x is not None and x.requires_grad and id(x) not in map(id, tensors) for x in inputs]
    ctx.anchored += [x is not None and x.requires_grad for x in summands]
    if True in ctx.anchored:
        every = zip((*inputs, *summands), ctx.anchored, strict=True)
        with torch.enable_grad():
            tensors += tuple(Anchor.apply(x) for x, anchored in every if anchored)
    ctx.save_for_backward(*tensors)


def saved_pack(ctx: Any) -> Packed:
    """What was given to `keep`."""
    return Packed(ctx.structure, _saved(ctx)[: ctx.count])


def kept_with_anchors(ctx: Any) -> tuple[Any, list[Tensor | None]]:
    """The nested tuples that were packed and given to `keep`, and what each of its inputs is `attached` by."""
    tensors = _saved(ctx)
    anchors = iter(tensors[ctx.count :])
    saved = unpack(Packed(ctx.structure, tensors[: ctx.count]))
    return saved, [next(anchors) if anchored else None for anchored in ctx.anchored]


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    if ctx.unpacked is None:
        ctx.unpacked = ctx.saved_tensors
    saved: tuple[Tensor, ...] = ctx.unpacked
    return saved


@contextmanager
def unpacked_once(ctx: Any) -> Iterator[None]:
    """Keep what was saved as long as a backward pass lasts: checkpointing gives it once."""
    ctx.unpacked = None
    try:
        yield
    finally:
        ctx.unpacked = None


def let_go(ctx: Any) -> None:
    """Drop what was saved, unless the graph is retained: the backward pass that has it needs it for the last time."""
    ctx.unpacked = None
    clear_saved(ctx)


def attached(copy: Tensor, anchor: Tensor | None) -> Tensor:
    """An input of a forward pass, from the copy that was kept, in its own dtype and as part of its graph.

    Without an anchor the copy is the input itself, or nobody needs it to be.
    """
    return copy if anchor is None else (copy.detach() + anchor).to(anchor.dtype)


def _detach(nested: Any, tensors: list[Tensor]) -> Any:
    if isinstance(nested, Tensor):
        tensors.append(nested)
        return Place(len(tensors) - 1)
    return like(nested, [_detach(part, tensors) for part in nested]) if isinstance(nested, tuple) else nested


def _attach(part: Any, tensors: tuple[Tensor, ...]) -> Any:
    if isinstance(part, Place):
        return tensors[part]
    return like(part, [_attach(inner, tensors) for inner in part]) if isinstance(part, tuple) else part
