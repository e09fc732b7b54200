"""The dense block as one autograd node: one buffer of features, each measured once by the layer that wrote it.

Eager PyTorch concatenates before every layer, measures all of a layer's C input channels again, and writes them
normalised and once more rectified. Here the block's output is the buffer: the input is put into its first channels and
every layer's K new ones behind them, and a layer consumes a slice of it, the first C channels. Batch statistics belong
to a channel and not to a consumer, so that a layer's batch norm over C channels is finalised from the vectors that the
producers' epilogues left. In passes over a layer's C input channels (the bottleneck's 4K apart):

forward, eager 8 (concatenation 2, statistics 1, normalise 2, ReLU 2, convolution 1); here 1, formed on load.
backward, eager 14 (weight gradient 1, input gradient 1, ReLU 3, batch norm 2 + 3, concatenation 1 and its sum 3); here
4 (weight gradient 1, input gradient with mask and sums 1, its epilogue's sum with what later layers sent to the
features 2: see `add_feature_grad`).

Saved: the buffer and each bottleneck's raw output; eager keeps every concatenation and every rectified tensor.

A slice's pixels are C_total apart, which kernels and the library take (`pitch_of`): nothing is copied out of the
buffer, and a layer's last convolution writes into it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres.activation import RELU, Activation
from fusedres.autograd import walk
from fusedres.autograd.composed import Composed, convolved, normalised, through
from fusedres.autograd.function import FusedFunction, Given, Gradients, Passed
from fusedres.autograd.graph import Norms
from fusedres.autograd.layer import Below, Branch, LayerGrads, normaliser_of
from fusedres.autograd.saved import Packed, attached, kept_with_anchors, pack, unpack
from fusedres.autograd.spec import LayerSpec, PatternSpec, layers_of, norms_of
from fusedres.operands import (
    LAYER_TENSORS,
    NORM_TENSORS,
    ConvInput,
    Layer,
    Norm,
    Normaliser,
    NormNumbers,
    OutputGrad,
    Partials,
    Producer,
)
from fusedres.ops.bn_act import bn_act
from fusedres.ops.bn_statistics import bn_statistics
from fusedres.ops.conv_forward import conv_forward
from fusedres.ops.conv_input_grad import ProducerGrad, at_producer, sent_to_features
from fusedres.ops.feature_statistics import FeatureCorrections, FeatureStatistics
from fusedres.ops.features import FeatureGrads, put_features
from fusedres.ops.rows import channels_last, empty_rows
from fusedres.plan.schedule import Schedule
from fusedres.runtime.holding import HELD, Holding
from fusedres.runtime.text import known

ELSEWHERE: Any = None
"""Stands for a tensor that is kept under another name."""


@dataclass(frozen=True)
class DenseLayerSpec(Holding):
    """A layer of a dense block: the batch norm and activation of its input, its convolutions, each but the last with a
    batch norm."""

    norm: NormNumbers
    layers: tuple[LayerSpec, ...]
    act: Activation = RELU

    @property
    def tensors(self) -> int:
        """How many tensors it has."""
        return NORM_TENSORS + LAYER_TENSORS * len(self.layers)

    def whole(self, tensors: Sequence[Tensor | None]) -> "DenseLayer":
        """The layer of its tensors."""
        head = Norm.of(tensors[:NORM_TENSORS], self.norm)
        return DenseLayer(head, layers_of(self.layers, tensors[NORM_TENSORS:]), self.act)


@dataclass(frozen=True)
class DenseSpec(PatternSpec):
    """``partials`` are the statistics of x, where its producer measured it."""

    layers: tuple[DenseLayerSpec, ...]
    partials: Partials | None = field(default=None, compare=False, repr=False, metadata=HELD)

    def apart(self, flat: Sequence[Any]) -> list[Sequence[Any]]:
        """A flat list of one entry per tensor, taken apart layer by layer."""
        found, at = [], 0
        for layer in self.layers:
            found.append(flat[at : at + layer.tensors])
            at += layer.tensors
        return found

    def whole(self, tensors: Sequence[Tensor | None]) -> list["DenseLayer"]:
        """The layers of their tensors."""
        return [layer.whole(own) for layer, own in zip(self.layers, self.apart(tensors), strict=True)]


known(DenseSpec, DenseLayerSpec)


class DenseLayer(NamedTuple):
    """A layer of a dense block."""

    norm: Norm
    convs: tuple[Layer, ...]
    act: Activation

    @property
    def growth(self) -> int:
        """How many channels it adds."""
        return self.convs[-1].weight.shape[0]

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """Its tensors without running statistics; of the batch norm of its input gamma and beta alone."""
        return (*self.norm.affine.tensors, *(tensor for conv in self.convs for tensor in conv.parameters))


class KeptLayer(NamedTuple):
    """``out`` is the activated input, where it was written."""

    numbers: Normaliser
    out: Tensor | None
    steps: tuple[walk.Step, ...]
    parameters: tuple[Tensor | None, ...]


class Kept(NamedTuple):
    features: Tensor
    mean: Tensor | None
    layers: tuple[KeptLayer, ...]


class Dense(FusedFunction):
    """z = x and every layer's output side by side, and the statistics of z where batch norms measure.

    ``apply(x, None, spec, *tensors)``: x (N, C, H, W); tensors are, for every layer, those of its input's `Norm` and of
    its convolutions. Returns (z, counts, mean, m2), the latter the `Partials` of z or None each.
    """

    op = "dense"
    measured = True

    @staticmethod
    def norms(spec: DenseSpec) -> Norms:
        found, at = [], 0
        for layer in spec.layers:
            found += [(at, layer.norm), *norms_of(layer.layers, at + NORM_TENSORS)]
            at += layer.tensors
        return found

    @staticmethod
    def run(x: Tensor, residual: None, spec: DenseSpec, tensors: tuple[Tensor | None, ...], under: None) -> Passed:
        layers = spec.whole(tensors)
        n, channels, h, w = x.shape
        total = channels + sum(layer.growth for layer in layers)
        features = empty_rows(x, size=(n, total, h, w))
        put_features(features, x, 0)
        measured = None
        if any(layer.norm.numbers.batch_stats for layer in layers):
            measured = FeatureStatistics(features)
            measured.put(bn_statistics(x) if spec.partials is None else spec.partials, 0)
        saved = []
        for layer in layers:
            end = channels + layer.growth
            out = features[:, channels:end]
            partials, kept = _layer_forward(features[:, :channels], out, layer, spec.schedule, measured)
            if measured is not None and partials is not None:
                measured.put(partials, channels)
            saved.append(kept)
            channels = end
        of_all = None if measured is None else measured.of(total)
        if not spec.call.differentiated:
            return Passed(features, None, of_all)
        mean = None if measured is None else measured.mean[0]
        return Passed(features, pack(Kept(features, mean, tuple(saved))), of_all)

    @staticmethod
    def go_back(dz: Tensor, sums: None, spec: DenseSpec, pack: Packed, given: Given) -> Gradients:
        """The gradients of x and of every tensor of the layers."""
        saved: Kept = unpack(pack)
        features = saved.features
        asked = spec.apart(given.tensors)
        needs, below = [], given.needed_x
        for own in asked:
            needs.append(walk.needs_of_layers(own[NORM_TENSORS:], below or any(own[:2])))
            below = below or any(own)
        # What layers send to the features: the first to send adds it to dz, the others to its sum in place.
        sent = channels_last(dz)
        into = empty_rows(sent)
        corrections = FeatureCorrections(features, saved.mean, dz.dtype)
        grads: list[list[Any]] = []
        end = features.shape[1]
        for i in range(len(spec.layers) - 1, -1, -1):
            layer = spec.layers[i].whole(saved.layers[i].parameters)
            first = end - layer.growth
            head: list[Any] = [None] * NORM_TENSORS
            dy = OutputGrad(corrections.applied(sent, first, end, corrected=sent is into))
            convs, at_source = _layer_backward(
                dy, features[:, :first], saved.layers[i], layer, spec.schedule, needs[i],
                FeatureGrads(sent[:, :first], into[:, :first]),
            )  # fmt: skip
            if at_source is not None:
                sums_, sent = at_source.sums, into
                for j, (grad, parameter) in enumerate(
                    ((sums_.sum_gy, layer.norm.gamma), (sums_.sum_g, layer.norm.beta))
                ):
                    head[j] = grad.to(parameter.dtype) if asked[i][j] and parameter is not None else None
                if layer.norm.numbers.batch_stats:
                    corrections.add(sums_, saved.layers[i].numbers)
            grads.append([*head, *(grad for conv in convs for grad in conv)])
            end = first
        dx = corrections.applied(sent, 0, given.size[1], corrected=sent is into) if given.needed_x else None
        return Gradients(dx, [grad for of_layer in reversed(grads) for grad in of_layer])

    @staticmethod
    def composed(ctx: Any, dz: Tensor) -> Composed:
        saved: Kept
        saved, (anchor,) = kept_with_anchors(ctx)
        spec: DenseSpec = ctx.spec

        def form(x: Tensor, residual: None, _: None, *tensors: Tensor | None) -> Tensor:
            for layer, kept in zip(spec.whole(tensors), saved.layers, strict=True):
                u = layer.act.value(normalised(x, layer.norm, kept.numbers)).to(x.dtype)
                u = through(u, layer.convs, [step.branch.norm for step in kept.steps[:-1]])
                x = torch.cat([x, convolved(u, layer.convs[-1])], 1)
            return x

        x = attached(saved.features[:, : ctx.given.size[1]], anchor)
        tensors = (tensor for layer in saved.layers for tensor in layer.parameters)
        return Composed((x, None, None, *tensors), form)


def _layer_forward(
    x: Tensor, out: Tensor, layer: DenseLayer, schedule: Schedule, measured: FeatureStatistics | None
) -> tuple[Partials | None, KeptLayer]:
    """Writes a layer's raw ``out``; its statistics, and what its backward pass needs besides the features."""
    partials = measured.of(x.shape[1]) if measured is not None and layer.norm.numbers.batch_stats else None
    numbers = normaliser_of(partials, layer.norm, x.dtype)
    activated, source = None, ConvInput(x, numbers.scale, numbers.shift, layer.act)
    if not schedule.prologue:
        activated, _ = bn_act(x, numbers.scale, numbers.shift, act=layer.act)
        source = ConvInput(activated)
    *inner, last = layer.convs
    u, steps = walk.forward(source, inner, schedule)
    _, of_y = conv_forward(
        u, last.weight_in(x.dtype), last.geometry, statistics=measured is not None, out=out
    )  # fmt: skip
    first, *others = (*steps, walk.Step(Branch(u)))
    # What the first convolution consumed is a slice of the features, or ``activated``: kept as that alone.
    first = first._replace(branch=first.branch._replace(source=ConvInput(ELSEWHERE)))
    return of_y, KeptLayer(numbers, activated, (first, *others), layer.parameters)


def _layer_backward(
    dy: OutputGrad, x: Tensor, saved: KeptLayer, layer: DenseLayer, schedule: Schedule, needs: list[Any],
    features: FeatureGrads,
) -> tuple[list[LayerGrads], ProducerGrad | None]:  # fmt: skip
    """The gradients of a layer's convolutions, and the sums of what it added to that of the features."""
    numbers = saved.numbers
    source = ConvInput(x, numbers.scale, numbers.shift, layer.act) if saved.out is None else ConvInput(saved.out)
    producer = Producer(x, numbers, act=layer.act)
    first, *others = saved.steps
    first = first._replace(branch=first.branch._replace(source=source))
    below = Below(producer=producer, features=features) if needs[0].source and schedule.statistics else Below()
    grads, du = walk.backward(dy, (first, *others), layer.convs, schedule, needs, below)
    if isinstance(du, Tensor):
        du = sent_to_features(at_producer(du, producer), producer, features)
    return grads, du
