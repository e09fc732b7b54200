"""The door of the pre-activation chains: tensors are checked, a schedule is chosen, and training or inference runs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .autocast import contraction_dtype, no_autocast
from .autograd import BNAddAct, PreAct
from .autograd.bn_add_act import BNAddActSpec
from .autograd.layer import normaliser_of
from .autograd.preact import PreActSpec
from .autograd.spec import NormSpec, NormTensors
from .carried import statistics
from .chain import Layer, Size, check_joins, check_norm, checked_size, is_differentiated, layer_spec
from .inference import Folded, folded_layer, infer_layer
from .launch import wants_kernels
from .ops.bn_act import bn_act
from .ops.bn_finalize import check_norm_vectors
from .ops.contract import ConvInput, Geometry, Partials, channels_last, check_activation
from .ops.conv_bn_act import Contraction, conv_bn_act
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
    spec = PreActSpec(
        norm=None if norm is None else norm.spec,
        layers=tuple(layer_spec(layer, dtype) for layer in layers),
        schedule=chosen,
        dtype=dtype,
        shortcut=shortcut,
        projection=None if projection is None else layer_spec(projection, dtype),
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


class Bare(NamedTuple):
    """A convolution without a batch norm behind it, as `Contraction` takes it."""

    weight: Tensor
    geometry: Geometry


def bare(layer: Layer) -> Bare:
    """Of a layer, its convolution."""
    return Bare(layer.tensors.weight, layer.geometry)


def as_kernels_take(layers: Sequence[Layer], x: Tensor, dtype: torch.dtype) -> tuple[Layer | Folded, ...]:
    """Layers whose batch norm is applied, folded where kernels run on ``x``."""
    return tuple(folded_layer(layer, dtype) for layer in layers) if wants_kernels(x) else tuple(layers)


def _infer(
    x: Tensor, dtype: torch.dtype, norm: Norm | None, layers: Sequence[Layer], projection: Layer | None,
    shortcut: str, zero_pad_stride: tuple[int, int],
) -> Tensor:  # fmt: skip
    inner, second = as_kernels_take(layers[:-1], x, dtype), None if projection is None else bare(projection)
    operands = (x, dtype, norm, inner, bare(layers[-1]), second, shortcut, zero_pad_stride)
    return replayed(_inferred, *operands) if wants_kernels(x) else _inferred(*operands)


def _inferred(
    x: Tensor, dtype: torch.dtype, norm: Norm | None, inner: tuple[Layer | Folded, ...], last: Bare,
    projection: Bare | None, shortcut: str, zero_pad_stride: tuple[int, int],
) -> Tensor:  # fmt: skip
    x = channels_last(x)
    source = ConvInput(x.to(dtype)) if norm is None else evaluated(x, dtype, norm)
    u = source
    for layer in inner:
        u = ConvInput(activated_by(u, layer))
    residual: Tensor | ZeroPadded | None = None
    if shortcut == "identity":
        residual = x
    elif shortcut == "zero_pad":
        residual = ZeroPadded(x, last.weight.shape[0], zero_pad_stride)
    second = None
    if projection is not None:
        second = Contraction(source, projection.weight.to(dtype), projection.geometry)
    main = Contraction(u, last.weight.to(dtype), last.geometry)
    return conv_bn_act(main, residual=residual, second=second, act=None)[0]


def evaluated(x: Tensor, dtype: torch.dtype, norm: Norm) -> ConvInput:
    """relu(bn(x)) from running statistics, formed on load where kernels do that."""
    numbers = normaliser_of(None, norm.tensors, norm.spec, x.dtype)
    if wants_kernels(x) and x.dtype == dtype:
        return ConvInput(x, numbers.scale, numbers.shift)
    return ConvInput(bn_act(x, numbers.scale, numbers.shift)[0].to(dtype))


def activated_by(u: ConvInput, layer: Layer | Folded) -> Tensor:
    """relu(bn(conv(u))) from running statistics."""
    if isinstance(layer, Folded):
        return conv_bn_act(Contraction(u, *layer))[0]
    return infer_layer(u.tensor, layer, "relu")
