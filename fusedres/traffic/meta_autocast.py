"""Autocast for plain modules on the meta device, where PyTorch has none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fusedres.runtime import autocast
from fusedres.runtime.torch_private import tree_map_only

# The functions of PyTorch's own lists ("Autocast Op Reference") that networks for images call; what is in none of them
# runs in the dtype of its inputs.
LOWER = frozenset({
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "matmul",
    "__matmul__", "__rmatmul__", "mm", "addmm", "addmv", "addbmm", "baddbmm", "bmm", "mv", "chain_matmul", "prelu",
    "scaled_dot_product_attention",
})  # fmt: skip
FP32 = frozenset({
    "__pow__", "__rpow__", "__rtruediv__", "acos", "asin", "cosh", "tan", "sinh", "exp", "expm1", "log", "log10",
    "log1p", "log2", "pow", "reciprocal", "rsqrt", "softmax", "log_softmax", "softmin", "softplus", "layer_norm",
    "group_norm", "norm", "normalize", "cosine_similarity", "cumsum", "cumprod", "prod", "sum", "cross_entropy",
    "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "kl_div", "binary_cross_entropy_with_logits",
})  # fmt: skip


@contextmanager
def meta_autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast to ``dtype`` for tensors on the meta device, in plain and in fused modules; None: nothing changes."""
    if dtype is None:
        yield
        return
    with autocast.on_meta(dtype), _Casts(dtype):
        yield


class _Casts(TorchFunctionMode):
    """Casts the operands of each call; a parameter once, as autocast's cache does."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.cast: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        wanted = self.dtype if name in LOWER else torch.float32 if name in FP32 else None
        if wanted is None or not autocast.enabled("meta"):
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(Tensor, lambda tensor: self._in(tensor, wanted), (args, kwargs or {}))
        # Not again for the calls that this one makes.
        with autocast.on_meta(None):
            return func(*args, **kwargs)

    def _in(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if not tensor.is_meta or not tensor.is_floating_point() or tensor.dtype in (dtype, torch.float64):
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad and dtype == self.dtype):
            return tensor.to(dtype)
        if id(tensor) not in self.cast:
            self.cast[id(tensor)] = (tensor, tensor.to(dtype))
        return self.cast[id(tensor)][1]
