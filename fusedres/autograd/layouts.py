"""The layout in which gradients arrive: read as they are where kernels can, put in order once where not."""

import torch
from torch import Tensor

from fusedres.ops.act_mask import is_pooled
from fusedres.ops.rows import channels_last
from fusedres.runtime.call import Call
from fusedres.runtime.fallback import Owner


def arrived(dz: Tensor, call: Call, owner: Owner | None) -> Tensor:
    """``dz`` (N, K, P, Q) channels_last, or as pooling expanded it where kernels read that.

    ``owner``, whose pass it is, is told the strides of a gradient that had to be copied.
    """
    if is_pooled(dz) and call.kernels:
        return dz
    ordered = channels_last(dz)
    # Expanded gradients have no layout to keep.
    if owner is not None and ordered is not dz and not is_pooled(dz):
        owner.fused_reordered = tuple(dz.stride())
    return ordered


def in_dtype(g: Tensor, dtype: torch.dtype) -> Tensor:
    """``g`` in another dtype; a pooled one stays expanded."""
    if g.dtype == dtype:
        return g
    return g[:, :, :1, :1].to(dtype).expand(g.shape) if is_pooled(g) else g.to(dtype)
