"""Batch norm and activation in one pass, where no convolution of ours wrote what is normalised."""

from torch import Tensor

from fusedres.activation import RELU, Activation
from fusedres.autograd import BNAddAct, BNPReLU
from fusedres.autograd.ends import BNAddActSpec, BNPReLUSpec
from fusedres.context import context
from fusedres.operands import Norm
from fusedres.ops.bn_prelu import check_slope
from fusedres.ops.checks import check_activation
from fusedres.patterns.door import check_norm_of, is_absent, one_sample, partials_of
from fusedres.runtime.call import Call
from fusedres.runtime.graphs import signed


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
    if is_absent(x, [one for one in (norm, residual_norm) if one is not None]):
        residual = None if residual is None else one_sample(residual)
        with context(absent=True):
            return run_bn_act(one_sample(x), norm, act, residual=residual, residual_norm=residual_norm)[:0]
    x = signed(x)
    size = tuple(x.shape)
    check_norm_of(size, norm)
    if residual is not None:
        check_activation("residual", residual, device=x.device)
        if tuple(residual.shape) != size:
            raise ValueError(f"residual: expected the shape of x, {size}, got {tuple(residual.shape)}")
        residual = signed(residual)
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
    if is_absent(x, (norm,)):
        with context(absent=True):
            return run_bn_prelu(one_sample(x), norm, slope)[:0]
    x = signed(x)
    check_norm_of(tuple(x.shape), norm)
    check_slope(slope, x.shape[1], x.device)
    call = Call.on(x, (slope, *norm.tensors))
    if slope.dtype != x.dtype and not call.autocast:
        raise TypeError(f"slope: expected the dtype of x, {x.dtype}, got {slope.dtype}")
    z: Tensor = BNPReLU.apply(x, None, BNPReLUSpec(call, norm.numbers, partials_of(x, norm)), slope, *norm.tensors)
    return z
