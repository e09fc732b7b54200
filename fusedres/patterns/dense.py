"""The dense blocks, each layer fed with everything before it, in training and inference."""

import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fusedres.activation import RELU, Activation
from fusedres.autograd import Dense
from fusedres.autograd.dense import DenseLayerSpec, DenseSpec
from fusedres.autograd.spec import LayerSpec
from fusedres.operands import Layer, Norm
from fusedres.ops.conv_forward import conv_forward
from fusedres.ops.features import put_features
from fusedres.ops.rows import empty_rows
from fusedres.patterns import eager, inference
from fusedres.patterns.chain import shapes_of
from fusedres.patterns.choose import AUTO, chain_schedule
from fusedres.patterns.door import (
    Size,
    check_joins,
    check_norm_of,
    checked_size,
    enter,
    leave_statistics,
    partials_of,
    with_rounded_weights,
)
from fusedres.patterns.graph import graphed
from fusedres.runtime.autocast import contraction_dtype
from fusedres.runtime.call import Call
from fusedres.runtime.text import known


class DenseLayerParts(NamedTuple):
    """A dense layer: the batch norm and activation of its input, its convolutions, the last without a batch norm."""

    norm: Norm
    convs: tuple[Layer, ...]
    act: Activation = RELU


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
    return enter(_Dense(x, layers, schedule))


@dataclass
class _Dense:
    """A call of `run_dense`."""

    x: Tensor
    layers: Sequence[DenseLayerParts]
    schedule: str

    @property
    def convs(self) -> list[Layer]:
        """Those of all layers."""
        return [conv for layer in self.layers for conv in layer.convs]

    @property
    def norms(self) -> Iterator[Norm]:
        for norm, convs, _ in self.layers:
            yield norm
            yield from (conv.norm for conv in convs)

    @property
    def tensors(self) -> Iterator[Tensor | None]:
        for norm, convs, _ in self.layers:
            yield from norm.tensors
            for conv in convs:
                yield from conv.tensors

    @property
    def shape(self) -> Hashable:
        return tuple([(shapes_of(layer.convs), layer.act) for layer in self.layers])

    def plain(self, call: Call) -> Tensor:
        features = [self.x]
        for norm, (*inner, last), act in self.layers:
            u = act.value(eager.normalised(torch.cat(features, 1), norm))
            features.append(eager.convolved(eager.through(u, tuple(inner), call.dtype), last, call.dtype))
        return torch.cat(features, 1)

    def check(self, call: Call) -> None:
        n, channels, h, w = self.x.shape
        for i, layer in enumerate(self.layers, start=1):
            size: Size = (n, channels, h, w)
            check_norm_of(size, layer.norm)
            for conv in layer.convs:
                size = checked_size(f"layer {i}", self.x, conv, size, call)
            check_joins(f"layer {i}", (n, 0, *size[2:]), (n, 0, h, w))
            channels += size[1]

    def infer(self, call: Call) -> Tensor:
        convs = iter(inference.evaluated(self.convs, call))
        layers = tuple(
            DenseLayerParts(inference.uncounted(norm), tuple(itertools.islice(convs, len(own))), act)
            for norm, own, act in self.layers
        )
        return inference.run(call, _inferred, self.x, layers, call)

    def train(self, call: Call) -> Tensor:
        specs = iter([LayerSpec.of(conv) for conv in with_rounded_weights(self.convs, call.dtype)])
        layers = tuple(
            DenseLayerSpec(norm.numbers, tuple(itertools.islice(specs, len(own))), act)
            for norm, own, act in self.layers
        )
        partials = partials_of(self.x, self.layers[0].norm if self.layers else None)
        spec = DenseSpec(call, chain_schedule(self.schedule, kernels=call.kernels), layers, partials)
        return leave_statistics(*Dense.apply(self.x, None, spec, *self.tensors))


def _inferred(x: Tensor, layers: tuple[DenseLayerParts, ...], call: Call) -> Tensor:
    channels = x.shape[1]
    total = channels + sum(layer.convs[-1].weight.shape[0] for layer in layers)
    features = empty_rows(x, size=(x.shape[0], total, *x.shape[2:]))
    put_features(features, x, 0)
    for norm, (*inner, last), act in layers:
        source = inference.normalised(features[:, :channels], norm, act, call)
        end = channels + last.weight.shape[0]
        u = inference.through(source, inner)
        conv_forward(u, last.weight, last.geometry, out=features[:, channels:end])
        channels = end
    return features


known(DenseLayerParts)
graphed(_Dense, enter)
