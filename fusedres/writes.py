"""What tells whether a parameter may have been written to, beside the counters that torch keeps."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = 0
_backwards = 0


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


# Optimizers with fused=True write to parameters without moving the counters that torch keeps of writes.
register_optimizer_step_post_hook(_count_step)


def count_backward() -> None:
    """A backward pass has begun; writes to ``parameter.data``, which torch does not count, come after one."""
    global _backwards
    _backwards += 1


def state_of(tensor: Tensor) -> tuple[Any, ...]:
    """Changes whenever a tensor is replaced, or written to by an optimizer, before the eyes of torch, or (as
    ``parameter.data -= lr * grad`` is) between a backward pass and now."""
    # A reference to memory that is gone equals none, though new memory may have its address.
    memory = weakref.ref(tensor.untyped_storage())
    return _steps, _backwards, memory, tensor.data_ptr(), tensor._version


def steps() -> int:
    """How many steps optimizers have taken in this process."""
    return _steps


def backwards() -> int:
    """How many backward passes of fused blocks have begun in this process."""
    return _backwards
