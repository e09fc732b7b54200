"""Global average pooling behind fused blocks, with a gradient that is not written out."""

import torch
from torch import Tensor, nn

from fusedres.autograd import GlobalPool
from fusedres.nn.parts import why_not_others
from fusedres.nn.tracing import is_traced
from fusedres.runtime.launch import left_to_library
from fusedres.runtime.torch_private import forward_class, has_hooks


def global_pool(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``; where it is global average pooling, with a gradient that is not written out."""
    if torch.compiler.is_dynamo_compiling():
        graphed: Tensor = module(x)
        return graphed
    everything = type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1))
    fits = everything and not is_traced(x) and x.dim() == 4 and not left_to_library(x)
    if not fits or not _gradient_is_unseen(x) or why_not_others([("avgpool", module)]) is not None:
        plain: Tensor = module(x)
        return plain
    z: Tensor = GlobalPool.apply(x)
    return z


def _gradient_is_unseen(x: Tensor) -> bool:
    """Whether nobody but a fused pass is given the gradient at ``x``, as far as can be told from here."""
    made_by = forward_class(x.grad_fn)
    ours = x.grad_fn is None or (made_by is not None and made_by.__module__.startswith("fusedres."))
    return ours and not has_hooks(x) and not x.retains_grad
