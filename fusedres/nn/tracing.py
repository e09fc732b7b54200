"""Who reads the forward pass as it is written, or waits for the call of every module: they get the plain modules.

A compiler gets fused passes as nodes of its graph (`nn.in_graph`).
"""

from typing import Any

import torch
from torch import Tensor, nn

from fusedres.runtime.graphs import is_graphed
from fusedres.runtime.torch_private import hooks_on_every_module, is_transformed

PLAIN_TENSORS = (nn.Parameter, Tensor, nn.Buffer)
"""The classes of tensors that fused passes take."""


def is_traced(x: Any) -> bool:
    """Whether somebody reads the forward pass, transforms it, or waits for every module's call: they get the plain
    modules."""
    if is_read() or not is_plain(x):
        return True
    return is_transformed() or hooks_on_every_module()


def is_plain(x: Any) -> bool:
    """Whether fused passes take a tensor: none of a class that computes in its own way."""
    return type(x) in PLAIN_TENSORS or is_graphed(x)


def is_read() -> bool:
    """Whether somebody goes through the code, line by line or by its calls, who wants what the plain modules call."""
    if torch.compiler.is_dynamo_compiling() or torch.jit.is_tracing():
        return True
    return torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()


def why_traced_everywhere() -> str | None:
    """Why every module of the process runs as it is written now, or None."""
    return "a hook for all modules waits for every call" if hooks_on_every_module() else None
