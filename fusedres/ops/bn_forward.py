"""Batch norm and its activation over a tensor in memory, measured and applied in one op."""

import torch
from torch import Tensor

from fusedres.activation import RELU, Activation
from fusedres.operands import Norm, Normaliser, statistics_dtype
from fusedres.ops.act_mask import activated
from fusedres.ops.bn_act import bn_act, check_act
from fusedres.ops.bn_finalize import bn_finalize, check_norm, normaliser
from fusedres.ops.bn_statistics import bn_statistics
from fusedres.ops.checks import check_activation
from fusedres.ops.op import Op
from fusedres.ops.zero_pad_shortcut import ZeroPadded, add_shortcut


def _check(
    y: Tensor,
    norm: Norm,
    *,
    residual: Tensor | ZeroPadded | None = None,
    act: Activation = RELU,
    bit_mask: bool = False,
) -> None:
    check_activation("y", y)
    check_act(act)
    check_norm(y.shape[1], norm)


def _bn_forward(
    y: Tensor,
    norm: Norm,
    *,
    residual: Tensor | ZeroPadded | None = None,
    act: Activation = RELU,
    bit_mask: bool = False,
) -> tuple[Tensor, Tensor | None, Normaliser]:
    """act(bn(y) + residual) with the batch's own statistics: `bn_statistics`, `bn_finalize`, `bn_act`.

    Args:
        y: (N, C, H, W) raw convolution output.
        norm: as in `bn_finalize`.
        residual: (N, C, H, W) or a `ZeroPadded` of that shape, added before the activation, or None.
        act: the activation.
        bit_mask: whether to return what a backward pass tells its slope from too.

    Returns:
        z (N, C, H, W), its mask (`activated`) or None, and the `Normaliser`.
    """
    numbers = bn_finalize(bn_statistics(y), norm)
    return *bn_act(y, numbers.scale, numbers.shift, residual=residual, act=act, bit_mask=bit_mask), numbers


bn_forward = Op(_bn_forward, check=_check)
# Its three ops have kernels of their own.
bn_forward.triton(_bn_forward)


@bn_forward.native
def _bn_forward_native(
    y: Tensor,
    norm: Norm,
    *,
    residual: Tensor | ZeroPadded | None = None,
    act: Activation = RELU,
    bit_mask: bool = False,
) -> tuple[Tensor, Tensor | None, Normaliser]:
    gamma, beta, running_mean, running_var, bias, counted, (eps, momentum, *_) = norm
    # With parameters in the statistics dtype, the library keeps its statistics there too, whatever y is stored in.
    if norm.numbers.is_shared or bias is not None or gamma is None or gamma.dtype != statistics_dtype(y.dtype):
        return NotImplemented
    if residual is not None and residual.dtype != y.dtype:
        return NotImplemented
    # First, as in PyTorch: what ends the pass between the two leaves no statistics of a batch that was not counted.
    if counted is not None:
        counted.add_(1)
    out, mean, invstd = torch.ops.aten.native_batch_norm(y, gamma, beta, running_mean, running_var, True, momentum, eps)
    if residual is not None:
        add_shortcut(out, residual)
    z, mask = activated(out, act, out.dtype, bit_mask=bit_mask, scratch=True)
    return z, mask, normaliser(mean, invstd, gamma, beta)
