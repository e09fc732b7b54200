"""Who reads the forward pass as it is written, or waits for the call of every module: they get the plain modules."""

from typing import Any

import torch
from torch import Tensor, nn

from fusedres.runtime.torch_private import hooks_on_every_module, is_transformed

PLAIN_TENSORS = (nn.Parameter, Tensor, nn.Buffer)
"""The classes of tensors that fused passes take."""


def is_traced(x: Any) -> bool:
    """Whether somebody reads the forward pass, transforms it, or waits for every module's call: they get the plain
    modules."""
    if type(x) not in PLAIN_TENSORS or is_read():
        return True  # who compiles is not to see what follows
    return is_transformed() or hooks_on_every_module()


def is_read() -> bool:
    """Whether a compiler or a tracer goes through the code."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def why_traced_everywhere() -> str | None:
    """Why every module of the process runs as it is written now, or None."""
    return "a hook for all modules waits for every call" if hooks_on_every_module() else None
