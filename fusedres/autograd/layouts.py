"""The layout in which gradients arrive: read as they are where kernels can, put in order once where not."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..launch import wants_kernels
from ..ops.contract import channels_last
from ..ops.relu_mask import is_pooled

_reordered: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""First weight of a layer or block -> the strides of a gradient that had to be copied for it."""


def arrived(dz: Tensor, weight: Callable[[], Tensor] | None = None) -> Tensor:
    """``dz`` (N, K, P, Q) channels_last, or as pooling expanded it where kernels read that.

    ``weight`` gives the first weight of its block, if that is to be told of a copy.
    """
    if is_pooled(dz) and wants_kernels(dz):
        return dz
    ordered = channels_last(dz)
    # Expanded gradients have no layout to keep.
    if weight is not None and ordered is not dz and not is_pooled(dz):
        _reordered[weight()] = dz.stride()
    return ordered


def reordered(weight: Tensor) -> tuple[int, ...] | None:
    """The strides of the last gradient that was not channels_last and was copied for this weight's block, or None."""
    strides: tuple[int, ...] | None = _reordered.get(weight)
    return strides


def in_dtype(g: Tensor, dtype: torch.dtype) -> Tensor:
    """``g`` in another dtype; a pooled one stays expanded."""
    if g.dtype == dtype:
        return g
    return g[:, :, :1, :1].to(dtype).expand(g.shape) if is_pooled(g) else g.to(dtype)
