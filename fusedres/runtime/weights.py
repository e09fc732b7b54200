"""Weights rounded to 16 bits under autocast: all of a network's in one launch, at the beginning of its forward pass.

Rounding is part of a pass: nothing outlives it, so that the next one sees whatever was written to a weight in between,
by whom and how ever. A network that knows its blocks (`of_network`) rounds for all of them; a block on its own rounds
its weights together.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fusedres.runtime.torch_private import copy_all, version

# Each copy begins at a multiple of so many elements, as kernels ask of addresses.
ALIGNMENT = 64


class _Pass(threading.local):
    """Of the network whose forward pass runs on this thread: id -> (tensor, its version and address, its copy)."""

    def __init__(self) -> None:
        self.dtype: torch.dtype | None = None
        self.known: dict[int, tuple[Tensor, tuple[int, int], Tensor]] = {}


_current = _Pass()


@contextmanager
def of_network(x: Tensor, dtype: torch.dtype, weights: Callable[[], Sequence[Tensor]]) -> Iterator[None]:
    """Round the weights of a network together; `rounded` gives their copies inside the ``with`` block.

    Args:
        x: its input.
        dtype: of the contractions.
        weights: gives (K, C, R, S) tensors, on the device of x; asked for only where something has to be rounded.
    """
    # A network inside another has been rounded for.
    if _current.dtype is not None or x.dtype == dtype:
        yield
        return
    chosen = [weight for weight in weights() if _fits(weight, x, dtype)]
    copies = _copies(chosen, dtype)
    _current.dtype = dtype
    _current.known = {id(one): (one, _state(one), copy) for one, copy in zip(chosen, copies, strict=True)}
    try:
        yield
    finally:
        _current.dtype, _current.known = None, {}


def rounded(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Tensors (K, C, R, S) as they are now in ``dtype``, without autograd where that is another than their own.

    Those that the network has rounded already are at hand, unless they were written to since; the others are rounded
    together.
    """
    found = [one if one.dtype == dtype else _at_hand(one, dtype) for one in tensors]
    missing = [i for i, copy in enumerate(found) if copy is None]
    alike = len({(tensors[i].dtype, tensors[i].device) for i in missing}) == 1
    plain = all(type(tensors[i]) in (Tensor, torch.nn.Parameter) for i in missing)
    if len(missing) > 1 and alike and plain:
        copies = _copies([tensors[i] for i in missing], dtype)
    else:
        copies = [_alone(tensors[i], dtype) for i in missing]
    for i, copy in zip(missing, copies, strict=True):
        found[i] = copy
    return [copy for copy in found if copy is not None]


def _alone(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype, memory_format=torch.channels_last)


def _at_hand(tensor: Tensor, dtype: torch.dtype) -> Tensor | None:
    known = _current.known.get(id(tensor))
    if known is None or _current.dtype != dtype:
        return None
    of, state, copy = known
    return copy if of is tensor and state == _state(tensor) else None


def _state(tensor: Tensor) -> tuple[int, int]:
    """Changes with every write that torch counts; no user's code runs between a network's beginning and its blocks."""
    return (0 if tensor.is_inference() else version(tensor)), tensor.data_ptr()


def _fits(weight: Tensor, x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a weight can be rounded with the input: a sharded one, for one, may have no memory yet."""
    if type(weight) not in (Tensor, torch.nn.Parameter) or (weight.device, weight.dim()) != (x.device, 4):
        return False
    whole = weight.is_meta or weight.untyped_storage().nbytes() >= weight.numel() * weight.element_size()
    return weight.dtype == x.dtype != dtype and whole


@torch.no_grad()
def _copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Channels_last copies of tensors on one device, in one piece of memory."""
    if not tensors:
        return []
    begins, end = [], 0
    for tensor in tensors:
        begins.append(end)
        end += -(-tensor.numel() // ALIGNMENT) * ALIGNMENT
    memory = torch.empty(end, dtype=dtype, device=tensors[0].device)
    copies = []
    for begin, tensor in zip(begins, tensors, strict=True):
        _, c, r, s = tensor.shape
        laid_out = tensor.is_contiguous(memory_format=torch.channels_last)
        strides = tensor.stride() if laid_out else (c * r * s, 1, s * c, c)
        copies.append(memory.as_strided(tensor.shape, strides, begin))
    # A list in which all strides agree is one launch; a single pair that does not makes it one for each.
    alike = [copy.stride() == tensor.stride() for copy, tensor in zip(copies, tensors, strict=True)]
    for wanted in (True, False):
        chosen = [i for i, agrees in enumerate(alike) if agrees is wanted]
        if chosen:
            copy_all([copies[i] for i in chosen], [tensors[i] for i in chosen])
    return copies
