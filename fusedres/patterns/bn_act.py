"""Batch norm and activation in one pass, where no convolution of ours wrote what is normalised."""

from torch import Tensor

from fusedres.activation import RELU, Activation
from fusedres.autograd import BNAddAct, BNPReLU
from fusedres.autograd.ends import BNAddActSpec, BNPReLUSpec
from fusedres.operands import Norm
from fusedres.ops.bn_prelu import check_slope
from fusedres.ops.checks import check_activation
from fusedres.patterns.door import check_norm_of, partials_of
from fusedres.runtime.call import Call


def run_bn_act(
    x: Tensor, norm: Norm, act: Activation = RELU, *, residual: Tensor | None = None, residual_norm: Norm | None = None
) -> Tensor:
    """act(bn(x) + residual), or act(bn(x) + bn'(residual)), fused, differentiable.

    Args:
        x: (N, C, H, W).
        norm: its batch norm.
        act: the activation.
        residual: (N, C, H, W), or None.
        residual_norm: the batch norm of the residual; None: it joins as it is.

    Returns:
        (N, C, H, W), channels_last.

    Raises:
        ValueError, TypeError: naming the argument, before any running statistic or counter has changed.
    """
    check_activation("x", x)
    x = x.resolve_neg()
    size = tuple(x.shape)
    check_norm_of(size, norm)
    if residual is not None:
        check_activation("residual", residual, device=x.device)
        if tuple(residual.shape) != size:
            raise ValueError(f"residual: expected the shape of x, {size}, got {tuple(residual.shape)}")
        residual = residual.resolve_neg()
    if residual_norm is not None:
        check_norm_of(size, residual_norm)
    other = residual_norm or Norm()
    call = Call.on(x, (residual, *norm.tensors, *other.tensors))
    numbers = None if residual_norm is None else residual_norm.numbers
    spec = BNAddActSpec(call, norm.numbers, numbers, act, partials_of(x, norm))
    z: Tensor = BNAddAct.apply(x, residual, spec, *norm.tensors, *other.tensors)
    return z


def run_bn_prelu(x: Tensor, norm: Norm, slope: Tensor) -> Tensor:
    """prelu(bn(x)), fused, differentiable, the slopes too.

    Args:
        x: (N, C, H, W).
        norm: its batch norm.
        slope: (C,), or (1,) for all channels; of the dtype of x, or under autocast of any.

    Returns:
        (N, C, H, W), channels_last.

    Raises:
        ValueError, TypeError: naming the argument, before any running statistic or counter has changed.
    """
    check_activation("x", x)
    x = x.resolve_neg()
    check_norm_of(tuple(x.shape), norm)
    check_slope(slope, x.shape[1], x.device)
    call = Call.on(x, (slope, *norm.tensors))
    if slope.dtype != x.dtype and not call.autocast:
        raise TypeError(f"slope: expected the dtype of x, {x.dtype}, got {slope.dtype}")
    z: Tensor = BNPReLU.apply(x, None, BNPReLUSpec(call, norm.numbers, partials_of(x, norm)), slope, *norm.tensors)
    return z
