"""The door of the dense blocks: tensors are checked, a schedule is chosen, and training or inference runs."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .autocast import contraction_dtype, no_autocast
from .autograd import Dense
from .autograd.dense import DenseLayerSpec, DenseSpec
from .carried import statistics
from .chain import Layer, Size, check_joins, checked_size, is_differentiated, layer_specs
from .inference import Evaluated, evaluated
from .launch import wants_kernels
from .ops.contract import ConvInput, Partials, RunningNorm, check_activation
from .ops.conv_bn_act import conv_bn_act
from .ops.conv_forward import conv_forward
from .ops.features import put_features
from .ops.rows import empty_rows
from .plan import AUTO
from .preact_chain import Norm, check_norm_of, normalised, running_norm, schedule_for
from .replay import replayed


class DenseLayerParts(NamedTuple):
    """A dense layer: the batch norm of its input, and its convolutions, the last without a batch norm."""

    norm: Norm
    convs: tuple[Layer, ...]


def takes_dense(x: Tensor) -> bool:
    """Whether a dense block runs fused on ``x``: its features have one dtype, that of its convolutions."""
    return x.dim() == 4 and x.dtype.is_floating_point and contraction_dtype(x) == x.dtype


def run_dense(x: Tensor, layers: Sequence[DenseLayerParts], *, schedule: str = AUTO) -> Tensor:
    """x and the outputs of all layers side by side, each layer fed with everything before it; differentiable.

    Args:
        x: (N, C, H, W) in the dtype of the convolutions (`takes_dense`).
        layers: in order; each takes C and the channels of all layers before it.
        schedule: ``"auto"`` or a rung of the ladder.

    Returns:
        (N, C + sum of the layers' channels, H, W), channels_last.

    Raises:
        ValueError, TypeError: naming the argument, before any running statistic or counter has changed.
    """
    check_activation("x", x)
    x = x.resolve_neg()
    n, channels, h, w = x.shape
    for i, (norm, convs) in enumerate(layers, start=1):
        size: Size = (n, channels, h, w)
        check_norm_of(size, norm)
        for conv in convs:
            size = checked_size(f"layer {i}", x, conv, size, x.dtype)
        check_joins(f"layer {i}", (n, 0, *size[2:]), (n, 0, h, w))
        channels += size[1]

    every = [conv for layer in layers for conv in layer.convs]
    norms = [tensor for layer in layers for tensor in layer.norm.tensors]
    measures = any(layer.norm.spec.batch_stats for layer in layers) or any(conv.norm.batch_stats for conv in every)
    if not measures and not is_differentiated(x, None, every, norms):
        with no_autocast(x.device.type):
            return _infer(x, layers, channels)
    specs = layer_specs(every, x.dtype)
    firsts = [0, *itertools.accumulate(len(layer.convs) for layer in layers)][: len(layers)]
    spec = DenseSpec(
        tuple(
            DenseLayerSpec(layer.norm.spec, specs[first : first + len(layer.convs)])
            for layer, first in zip(layers, firsts, strict=True)
        ),
        schedule_for(schedule, x),
        statistics.take(x) if layers and layers[0].norm.spec.batch_stats else None,
    )
    tensors = [t for norm, convs in layers for t in (*norm.tensors, *(t for conv in convs for t in conv.tensors))]
    z: Tensor
    z, *partials = Dense.apply(x, spec, *tensors)
    if partials[0] is not None:
        statistics.leave(z, Partials(*partials))
    return z


def _infer(x: Tensor, layers: Sequence[DenseLayerParts], total: int) -> Tensor:
    parts = tuple((running_norm(norm), evaluated(convs, x.dtype)) for norm, convs in layers)
    return replayed(_inferred, x, parts, total) if wants_kernels(x) else _inferred(x, parts, total)


def _inferred(x: Tensor, layers: tuple[tuple[RunningNorm, tuple[Evaluated, ...]], ...], total: int) -> Tensor:
    channels = x.shape[1]
    features = empty_rows(x, size=(x.shape[0], total, *x.shape[2:]))
    put_features(features, x, 0)
    for norm, (*inner, last) in layers:
        u = normalised(features[:, :channels], x.dtype, norm)
        for conv in inner:
            u = ConvInput(conv_bn_act(conv.of(u))[0])
        end = channels + last.weight.shape[0]
        conv_forward(u, last.weight, last.geometry, out=features[:, channels:end])
        channels = end
    return features
