"""Convolution weights rounded to 16 bits under autocast: all of a model's in one launch per forward pass."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .writes import backwards, steps

# Each copy begins at a multiple of so many elements, as kernels ask of addresses.
ALIGNMENT = 64


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` (K, C, R, S) as it is now in ``dtype``, channels_last, without autograd."""
    recomputed = torch._C._current_graph_task_id() != -1  # by checkpointing, in the middle of a backward pass
    if recomputed or not (weight.requires_grad and torch.is_grad_enabled()):
        return _alone(weight, dtype)
    key = weight.device, weight.dtype, dtype
    # Two threads may make one at a time; either will do.
    group = _groups.get(key) or _groups.setdefault(key, _Group(dtype))
    return group.copy_of(weight)


def _alone(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.detach().to(dtype, memory_format=torch.channels_last)


class _Copy(NamedTuple):
    """A copy that waits for its layer, and what tells whether its weight may have changed since."""

    weight: weakref.ref[Tensor]
    tensor: Tensor
    address: int
    version: int

    def is_of(self, weight: Tensor) -> bool:
        """Whether this is a copy of ``weight``, to which torch has seen no write since."""
        return self.weight() is weight and (self.address, self.version) == (weight.data_ptr(), weight._version)


class _Group:
    """Weights that are trained on one device, in the order in which forward passes ask for them.

    The first pass notes who asks, and each weight is rounded alone. From then on whoever begins a pass has every
    weight of the pass before rounded with its own. A copy is given out once, so that each pass rounds anew, whatever
    wrote to the weights in between, and nothing is kept behind it. What is out of the ordinary (a weight used twice,
    layers skipped or new, a weight that may have changed while its copy waited) is rounded alone.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._lock = threading.Lock()
        self._asked: dict[int, weakref.ref[Tensor]] = {}
        self._waiting: dict[int, _Copy] = {}
        self._first = 0
        self._moment: tuple[Any, ...] = ()

    def copy_of(self, weight: Tensor) -> Tensor:
        key = id(weight)
        with self._lock:
            copy = self._waiting.pop(key, None)
            known = self._asked.get(key)
            if copy is None and known is not None and known() is weight and (not self._waiting or key == self._first):
                return self._begin(weight)
            self._asked[key] = weakref.ref(weight)
        if copy is not None and copy.is_of(weight) and self._moment == _moment(weight):
            return copy.tensor
        return _alone(weight, self.dtype)

    def _begin(self, weight: Tensor) -> Tensor:
        """Round every weight that was asked for in the pass before, this one included."""
        asked = (known() for known in self._asked.values())
        others = [other for other in asked if other is not None and other is not weight and _alike(other, weight)]
        copy, *copies = _copies([weight, *others], self.dtype)
        waiting = zip(others, copies, strict=True)
        self._waiting = {
            id(other): _Copy(weakref.ref(other), made, other.data_ptr(), other._version) for other, made in waiting
        }
        self._asked = {id(weight): weakref.ref(weight)}
        self._first, self._moment = id(weight), _moment(weight)
        return copy


_groups: dict[tuple[torch.device, torch.dtype, torch.dtype], _Group] = {}


def _alike(other: Tensor, weight: Tensor) -> bool:
    """Whether both can be rounded together: a model may have been moved, or its weights be sharded, meanwhile."""
    same = (other.device, other.dtype, other.dim()) == (weight.device, weight.dtype, weight.dim())
    return same and other.untyped_storage().nbytes() >= other.numel() * other.element_size()


def _moment(weight: Tensor) -> tuple[Any, ...]:
    """Changes where weights may be written to unseen, and where work goes to another stream or into a CUDA graph.

    A copy that a graph makes is of no use outside of it, nor the other way round.
    """
    if not weight.is_cuda:
        return steps(), backwards()
    stream = torch.cuda.current_stream(weight.device).cuda_stream
    return steps(), backwards(), stream, torch.cuda.is_current_stream_capturing()


@torch.no_grad()
def _copies(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Channels_last copies of weights on one device, in one piece of memory."""
    begins, end = [], 0
    for weight in weights:
        begins.append(end)
        end += -(-weight.numel() // ALIGNMENT) * ALIGNMENT
    memory = torch.empty(end, dtype=dtype, device=weights[0].device)
    copies = []
    for begin, weight in zip(begins, weights, strict=True):
        _, c, r, s = weight.shape
        copies.append(memory.as_strided(weight.shape, (c * r * s, 1, s * c, c), begin))
    torch._foreach_copy_(copies, list(weights))
    return copies
