"""Batch norm and its activation over a tensor in memory, measured and applied in one op."""

import torch
from torch import Tensor

from .bn_act import bn_act, check_act
from .bn_finalize import bn_finalize, check_norm_vectors, normaliser
from .bn_statistics import bn_statistics
from .contract import Normaliser, check_activation, statistics_dtype
from .op import Op
from .relu_mask import pack_relu_mask
from .zero_pad_shortcut import ZeroPadded, add_shortcut


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
    counted: Tensor | None = None,
    residual: Tensor | ZeroPadded | None = None,
    act: str | None = "relu",
    bit_mask: bool = False,
) -> tuple[Tensor, Tensor | None, Normaliser]:
    """act(bn(y) + residual) with the batch's own statistics: `bn_statistics`, `bn_finalize`, `bn_act`.

    Args:
        y: (N, C, H, W) raw convolution output.
        gamma, beta, running_mean, running_var, bias, eps, momentum, counted: as in `bn_finalize`.
        residual: (N, C, H, W) or a `ZeroPadded` of that shape, added before the activation, or None.
        act: ``"relu"`` or None.
        bit_mask: whether to return the ReLU's open positions too.

    Returns:
        z (N, C, H, W), the bit mask (`pack_relu_mask`) or None, and the `Normaliser`.
    """
    norm = bn_finalize(
        bn_statistics(y), gamma, beta, running_mean, running_var, bias=bias, eps=eps, momentum=momentum,
        counted=counted,
    )  # fmt: skip
    return *bn_act(y, norm.scale, norm.shift, residual=residual, act=act, bit_mask=bit_mask), norm


bn_forward = Op(_bn_forward)
# Its three ops have kernels of their own.
bn_forward.triton(_bn_forward)


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
    counted: Tensor | None = None,
    residual: Tensor | ZeroPadded | None = None,
    act: str | None = "relu",
    bit_mask: bool = False,
) -> tuple[Tensor, Tensor | None, Normaliser]:
    # With parameters in the statistics dtype, the library keeps its statistics there too, whatever y is stored in.
    if bias is not None or gamma is None or gamma.dtype != statistics_dtype(y.dtype):
        return NotImplemented
    if residual is not None and residual.dtype != y.dtype:
        return NotImplemented
    check_activation("y", y)
    check_act(act)
    check_norm_vectors(y.shape[1], gamma, beta, running_mean, running_var, bias)
    out, mean, invstd = torch.ops.aten.native_batch_norm(y, gamma, beta, running_mean, running_var, True, momentum, eps)
    if counted is not None:
        counted.add_(1)
    if residual is not None:
        add_shortcut(out, residual)
    if act == "relu":
        out.relu_()
    return out, pack_relu_mask(out) if bit_mask else None, normaliser(mean, invstd, gamma, beta)
