"""Batch norm and its activation over a tensor in memory, measured and applied in one op."""

import torch
from torch import Tensor

from .bn_act import bn_act
from .bn_finalize import bn_finalize, normaliser
from .bn_statistics import bn_statistics
from .contract import Normaliser, check_activation, statistics_dtype
from .op import Op


def _bn_forward(
    y: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    momentum: float = 0.1,
    act: str | None = "relu",
) -> tuple[Tensor, Normaliser]:
    """act(bn(y)) with the batch's own statistics: `bn_statistics`, `bn_finalize`, `bn_act`.

    Args:
        y: (N, C, H, W) raw convolution output.
        gamma, beta, running_mean, running_var, bias, eps, momentum: as in `bn_finalize`.
        act: ``"relu"`` or None.

    Returns:
        The normalised and activated tensor (N, C, H, W), and the `Normaliser`.
    """
    norm = bn_finalize(bn_statistics(y), gamma, beta, running_mean, running_var, bias=bias, eps=eps, momentum=momentum)
    return bn_act(y, norm.scale, norm.shift, act=act)[0], norm


bn_forward = Op(_bn_forward)


@bn_forward.native
def _bn_forward_native(
    y: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    momentum: float = 0.1,
    act: str | None = "relu",
) -> tuple[Tensor, Normaliser]:
    plain = y.dtype == statistics_dtype(y.dtype) and bias is None and gamma is not None and gamma.dtype == y.dtype
    if not plain:
        return NotImplemented
    check_activation("y", y)
    out, mean, invstd = torch.ops.aten.native_batch_norm(y, gamma, beta, running_mean, running_var, True, momentum, eps)
    if act == "relu":
        out.relu_()
    return out, normaliser(mean, invstd, gamma, beta)
