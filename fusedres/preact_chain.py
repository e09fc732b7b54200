"""The door of the pre-activation chains: tensors are checked, a schedule is chosen, and training or inference runs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .autocast import contraction_dtype, no_autocast
from .autograd import BNAddAct, PreAct
from .autograd.bn_add_act import BNAddActSpec
from .autograd.layer import normaliser_of
from .autograd.preact import BARE, PreActSpec, unnormalised
from .autograd.spec import LayerSpec, NormSpec, NormTensors
from .carried import carried, carry
from .chain import Layer, Size, advance, check_joins, check_norm, checked_size, is_differentiated
from .inference import contraction_of, infer_layer
from .launch import wants_kernels
from .ops.bn_act import bn_act
from .ops.bn_finalize import check_norm_vectors
from .ops.contract import ConvInput, Partials, channels_last, check_activation, pixels
from .ops.conv_bn_act import conv_bn_act
from .ops.zero_pad_shortcut import zero_pad_shortcut, zero_pad_size
from .plan import AUTO, chain_schedule


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
    counters: Sequence[Tensor] = (),
) -> Tensor:
    """conv(relu(bn(... conv(relu(bn(x)))))) + shortcut, fused, differentiable once.

    Args:
        x: (N, C, H, W), any memory format (channels_last is fastest).
        norm: of x; None where x is activated already.
        layers: the convolutions in order, each with the batch norm behind it; the last one's norm is not applied.
        projection: the convolution of a projection shortcut, which takes what the first convolution does.
        shortcut: ``"none"``, ``"identity"``, ``"zero_pad"`` or ``"projection"``.
        zero_pad_stride: of the zero-pad shortcut.
        schedule: ``"auto"`` or a rung of the ladder.
        counters: of batches, advanced by one as soon as nothing can be refused any more.

    Returns:
        (N, K, P, Q), channels_last.

    Raises:
        ValueError, TypeError: naming the argument, before any running statistic or counter has changed.
    """
    check_activation("x", x)
    dtype = contraction_dtype(x)
    if norm is not None:
        _check_norm_of(x, norm)
    size: Size = tuple(x.shape)
    for i, layer in enumerate(layers, start=1):
        size = checked_size("x" if i == 1 else f"layer {i}", x, layer, size, dtype)
    if projection is not None:
        check_joins("projection", checked_size("projection", x, projection, tuple(x.shape), dtype), size)
    elif shortcut == "identity":
        check_joins("x", tuple(x.shape), size)
    elif shortcut == "zero_pad":
        check_joins("shortcut", zero_pad_size(tuple(x.shape), size[1], zero_pad_stride), size)

    advance(counters)
    every = [*layers, projection] if projection is not None else list(layers)
    measures = (norm is not None and norm.spec.batch_stats) or any(layer.norm.batch_stats for layer in every)
    if not measures and not is_differentiated(x, None, every, () if norm is None else norm.tensors):
        with no_autocast(x.device.type):
            return _infer(x, dtype, norm, layers, projection, shortcut, zero_pad_stride)

    chosen = chain_schedule(schedule, kernels=wants_kernels(x))
    spec = PreActSpec(
        norm=None if norm is None else norm.spec,
        layers=tuple(LayerSpec(layer.geometry, layer.norm) for layer in layers),
        schedule=chosen,
        dtype=dtype,
        shortcut=shortcut,
        projection=None if projection is None else LayerSpec(projection.geometry, BARE),
        zero_pad_stride=zero_pad_stride,
        partials=_partials_of(x, norm),
        measured=chosen.statistics and measures,
    )
    tensors = [tensor for layer in every for tensor in layer.tensors]
    z: Tensor
    z, *measured = PreAct.apply(x, spec, *(NormTensors() if norm is None else norm.tensors), *tensors)
    if measured[0] is not None:
        carry(z, Partials(*measured))
    return z


def run_bn_act(x: Tensor, norm: Norm, *, counters: Sequence[Tensor] = ()) -> Tensor:
    """relu(bn(x)), fused, differentiable once.

    Args:
        x: (N, C, H, W).
        norm: its batch norm.
        counters: as in `run_preact`.

    Returns:
        (N, C, H, W), channels_last.

    Raises:
        ValueError, TypeError: naming the argument, before any running statistic or counter has changed.
    """
    check_activation("x", x)
    _check_norm_of(x, norm)
    advance(counters)
    spec = BNAddActSpec(norm.spec, partials=_partials_of(x, norm))
    z: Tensor = BNAddAct.apply(x, None, spec, *norm.tensors, *NormTensors())
    return z


def _check_norm_of(x: Tensor, norm: Norm) -> None:
    check_norm_vectors(x.shape[1], *norm.tensors)
    check_norm("x", norm.spec, pixels(x))


def _partials_of(x: Tensor, norm: Norm | None) -> Partials | None:
    return carried(x) if norm is not None and norm.spec.batch_stats else None


def _infer(
    x: Tensor, dtype: torch.dtype, norm: Norm | None, layers: Sequence[Layer], projection: Layer | None,
    shortcut: str, zero_pad_stride: tuple[int, int],
) -> Tensor:  # fmt: skip
    x = channels_last(x)
    source = ConvInput(x.to(dtype))
    if norm is not None:
        numbers = normaliser_of(None, norm.tensors, norm.spec, x.dtype)
        if wants_kernels(x) and x.dtype == dtype:
            source = ConvInput(x, numbers.scale, numbers.shift)
        else:
            source = ConvInput(bn_act(x, numbers.scale, numbers.shift)[0].to(dtype))
    u = source
    for layer in layers[:-1]:
        u = ConvInput(_activated(u, layer))
    residual: Tensor | None = None
    if shortcut == "identity":
        residual = x
    elif shortcut == "zero_pad":
        residual = zero_pad_shortcut(x, layers[-1].tensors.weight.shape[0], zero_pad_stride)
    second = None
    if projection is not None:
        second = unnormalised(source, projection.tensors.weight.to(dtype), projection.geometry)
    main = unnormalised(u, layers[-1].tensors.weight.to(dtype), layers[-1].geometry)
    return conv_bn_act(main, residual=residual, second=second, act=None)[0]


def _activated(u: ConvInput, layer: Layer) -> Tensor:
    if u.scale is None:
        return infer_layer(u.tensor, layer, "relu")
    return conv_bn_act(contraction_of(u.tensor, layer)._replace(u=u))[0]
