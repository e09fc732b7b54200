"""The tests of compiled kernels on a real GPU: ``FUSEDRES_TEST_DEVICE=cuda pytest tests/kernels``.

Operands and results stay on the CPU, where the tests hold them against fp64 as they always do; each op's operands go to
the device with the strides that they have, its kernels run there as in a user's program, and its results come back.
Memory that was not written is NaN there too. ``vgpu:sm_90`` instead of ``cuda`` goes the same way without a GPU.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import fusedres
from fusedres.bench.declared import target_for
from fusedres.bench.setting import device_named
from fusedres.ops.op import Op
from fusedres.runtime.launch import Trace

NAME = os.environ.get("FUSEDRES_TEST_DEVICE")
DEVICE = None if NAME is None else device_named(NAME)
# The one whose tiles the tests go through.
TARGET = None if DEVICE is None else target_for(DEVICE)

emulated_only = pytest.mark.skipif(DEVICE is not None, reason="looks at what the emulator counts or refuses")


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On ``device``, with the same strides and offset: a broadcast dimension stays one."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    flat = tensor.detach().as_strided((count,), (1,), 0)
    there = flat.to(device) if flat.device != device else flat.clone()
    return there.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested tuples and mappings with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(part, change) for key, part in value.items()}
    if isinstance(value, tuple):
        parts = [mapped(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


@contextmanager
def operands_moved(updated: Sequence[Tensor]) -> Iterator[None]:
    """Ops called inside run on the device; the tensors ``updated`` in place there are updated here."""
    assert DEVICE is not None
    call, inside = Op.__call__, [False]

    def through_the_device(self: Op, *operands: Any, **keywords: Any) -> Any:
        if inside[0]:  # an op that calls others is there already
            return call(self, *operands, **keywords)
        pairs: dict[int, tuple[Tensor, Tensor]] = {}

        def there(tensor: Tensor) -> Tensor:
            return pairs.setdefault(id(tensor), (tensor, moved(tensor, DEVICE.torch)))[1]

        inside[0] = True
        try:
            result = call(self, *mapped(operands, there), **mapped(keywords, there))
        finally:
            inside[0] = False
        for tensor in updated:
            if id(tensor) in pairs:
                tensor.copy_(pairs[id(tensor)][1])
        return mapped(result, lambda tensor: moved(tensor, torch.device("cpu")))

    with patch.object(Op, "__call__", through_the_device):
        yield


@contextmanager
def poisoned() -> Iterator[None]:
    """Tensors that nothing has written are NaN, and integers the largest there are."""
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


@contextmanager
def on_device(updated: Sequence[Tensor]) -> Iterator[Trace]:
    """Everything called inside runs its kernels on the device; the account of their launches."""
    assert DEVICE is not None
    with ExitStack() as stack:
        # A library call would do for some convolutions, but it is the kernels that are looked at.
        stack.enter_context(patch("fusedres.runtime.backends.runs_native", lambda: False))
        stack.enter_context(fusedres.backend(DEVICE.backend if DEVICE.executed_on_cpu else "triton"))
        stack.enter_context(poisoned())
        stack.enter_context(operands_moved(updated))
        yield stack.enter_context(fusedres.record())
