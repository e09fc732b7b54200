"""The door of the pre-activation chains: tensors are checked, a schedule is chosen, and training or inference runs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .autocast import contraction_dtype, no_autocast
from .autograd import BNAddAct, PreAct
from .autograd.bn_add_act import BNAddActSpec
from .autograd.preact import PreActSpec
from .autograd.spec import NormSpec, NormTensors
from .carried import statistics
from .chain import Layer, Size, check_joins, check_norm, checked_size, is_differentiated, layer_specs
from .inference import Evaluated, evaluated
from .launch import wants_kernels
from .ops.bn_act import bn_act
from .ops.bn_finalize import bn_from_running, check_norm_vectors
from .ops.contract import ConvInput, Partials, RunningNorm, channels_last, check_activation, statistics_dtype
from .ops.conv_bn_act import conv_bn_act
from .ops.zero_pad_shortcut import ZeroPadded, zero_pad_size
from .plan import AUTO, Schedule, chain_schedule
from .replay import replayed


class Norm(NamedTuple):
    """A batch norm: tensors, numbers."""

    tensors: NormTensors
    spec: NormSpec


def run_preact(
    x: Tensor,
    norm: Norm | None,
    layers: Sequence[Layer],
    *,
    projection: Layer | None = None,
    shortcut: str = "identity",
    zero_pad_stride: tuple[int, int] = (1, 1),
    schedule: str = AUTO,
    measured: bool = True,
) -> Tensor:
    """conv(relu(bn(... conv(relu(bn(x)))))) + shortcut, fused, differentiable.

    Args:
        x: (N, C, H, W), any memory format (channels_last is fastest).
        norm: of x; None where x is activated already.
        layers: the convolutions in order, each with the batch norm behind it; the last one's norm is not applied.
        projection: the convolution of a projection shortcut, which takes what the first convolution does.
        shortcut: ``"none"``, ``"identity"``, ``"zero_pad"`` or ``"projection"``.
        zero_pad_stride: of the zero-pad shortcut.
        schedule: ``"auto"`` or a rung of the ladder.
        measured: whether a batch norm of the output may follow, for which it is measured as it is written.

    Returns:
        (N, K, P, Q), channels_last.

    Raises:
        ValueError, TypeError: naming the argument, before any running statistic or counter has changed.
    """
    check_activation("x", x)
    x = x.resolve_neg()
    dtype = contraction_dtype(x)
    if norm is not None:
        check_norm_of(tuple(x.shape), norm)
    size: Size = tuple(x.shape)
    for i, layer in enumerate(layers, start=1):
        size = checked_size("x" if i == 1 else f"layer {i}", x, layer, size, dtype)
    if projection is not None:
        check_joins("projection", checked_size("projection", x, projection, tuple(x.shape), dtype), size)
    elif shortcut == "identity":
        check_joins("x", tuple(x.shape), size)
    elif shortcut == "zero_pad":
        check_joins("shortcut", zero_pad_size(tuple(x.shape), size[1], zero_pad_stride), size)

    every = [*layers, projection] if projection is not None else list(layers)
    measures = (norm is not None and norm.spec.batch_stats) or any(layer.norm.batch_stats for layer in every)
    if not measures and not is_differentiated(x, None, every, () if norm is None else norm.tensors):
        with no_autocast(x.device.type):
            return _infer(x, dtype, norm, layers, projection, shortcut, zero_pad_stride)

    chosen = schedule_for(schedule, x)
    specs = layer_specs(every, dtype)
    spec = PreActSpec(
        norm=None if norm is None else norm.spec,
        layers=specs[: len(layers)],
        schedule=chosen,
        dtype=dtype,
        shortcut=shortcut,
        projection=None if projection is None else specs[-1],
        zero_pad_stride=zero_pad_stride,
        partials=partials_of(x, norm),
        measured=measured and chosen.statistics and measures,
    )
    tensors = [tensor for layer in every for tensor in layer.tensors]
    z: Tensor
    z, *partials = PreAct.apply(x, spec, *(NormTensors() if norm is None else norm.tensors), *tensors)
    if partials[0] is not None:
        statistics.leave(z, Partials(*partials))
    return z


def run_bn_act(x: Tensor, norm: Norm) -> Tensor:
    """relu(bn(x)), fused, differentiable.

    Args:
        x: (N, C, H, W).
        norm: its batch norm.

    Returns:
        (N, C, H, W), channels_last.

    Raises:
        ValueError, TypeError: naming the argument, before any running statistic or counter has changed.
    """
    check_activation("x", x)
    x = x.resolve_neg()
    check_norm_of(tuple(x.shape), norm)
    spec = BNAddActSpec(norm.spec, partials=partials_of(x, norm))
    z: Tensor = BNAddAct.apply(x, None, spec, *norm.tensors, *NormTensors())
    return z


def schedule_for(requested: str, x: Tensor) -> Schedule:
    """What `auto` is for blocks that begin with a batch norm: on kernels the prologue, fewest bytes and launches."""
    kernels = wants_kernels(x)
    return chain_schedule("prologue" if requested == AUTO and kernels else requested, kernels=kernels)


def check_norm_of(size: Size, norm: Norm) -> None:
    """Refuse vectors of another length than an (N, C, H, W) has channels, and numbers that batch norm can not use."""
    check_norm_vectors(size[1], *norm.tensors.vectors)
    check_norm("x", norm.spec, size[0] * size[2] * size[3])


def partials_of(x: Tensor, norm: Norm | None) -> Partials | None:
    """The statistics of x that its producer left, if its batch norm measures."""
    return statistics.take(x) if norm is not None and norm.spec.batch_stats else None


def _infer(
    x: Tensor, dtype: torch.dtype, norm: Norm | None, layers: Sequence[Layer], projection: Layer | None,
    shortcut: str, zero_pad_stride: tuple[int, int],
) -> Tensor:  # fmt: skip
    every = evaluated(layers if projection is None else [*layers, projection], dtype)
    last, second = len(layers) - 1, None if projection is None else every[-1]
    operands = (
        x,
        dtype,
        None if norm is None else running_norm(norm),
        every[:last],
        every[last],
        second,
        shortcut,
        zero_pad_stride,
    )
    return replayed(_inferred, *operands) if wants_kernels(x) else _inferred(*operands)


def _inferred(
    x: Tensor, dtype: torch.dtype, norm: RunningNorm | None, inner: tuple[Evaluated, ...], last: Evaluated,
    projection: Evaluated | None, shortcut: str, zero_pad_stride: tuple[int, int],
) -> Tensor:  # fmt: skip
    x = channels_last(x)
    source = ConvInput(x.to(dtype)) if norm is None else normalised(x, dtype, norm)
    u = source
    for layer in inner:
        u = ConvInput(conv_bn_act(layer.of(u))[0])
    residual: Tensor | ZeroPadded | None = None
    if shortcut == "identity":
        residual = x
    elif shortcut == "zero_pad":
        residual = ZeroPadded(x, last.weight.shape[0], zero_pad_stride)
    second = None if projection is None else projection.of(source)
    return conv_bn_act(last.of(u), residual=residual, second=second, act=None)[0]


def running_norm(norm: Norm) -> RunningNorm:
    """A batch norm in evaluation, as it is stored."""
    gamma, beta, running_mean, running_var, bias, _ = norm.tensors
    assert running_mean is not None and running_var is not None
    return RunningNorm(running_mean, running_var, gamma, beta, bias, norm.spec.eps)


def normalised(x: Tensor, dtype: torch.dtype, norm: RunningNorm) -> ConvInput:
    """relu(bn(x)) from running statistics, formed on load where kernels do that.

    Its numbers are formed by a launch of their own: a convolution's loop would form them at every tap.
    """
    numbers = bn_from_running(norm, statistics_dtype(x.dtype))
    if wants_kernels(x) and x.dtype == dtype:
        return ConvInput(x, numbers.scale, numbers.shift)
    return ConvInput(bn_act(x, numbers.scale, numbers.shift)[0].to(dtype))
