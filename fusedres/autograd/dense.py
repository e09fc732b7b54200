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

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..autocast import no_autocast
from ..ops.bn_act import bn_act
from ..ops.bn_backward import bn_backward_apply
from ..ops.bn_finalize import bn_combine
from ..ops.bn_statistics import bn_statistics
from ..ops.contract import (
    ConvInput,
    Normaliser,
    OutputGrad,
    Partials,
    Producer,
    channels_last,
    pixels,
    statistics_dtype,
)
from ..ops.conv_forward import conv_forward
from ..ops.conv_input_grad import ProducerGrad, at_producer, sent_to_features
from ..ops.features import FeatureGrads, put_features
from ..ops.rows import empty_rows
from ..plan import Schedule
from ..replay import Holding, replayed
from .composed import Composed, dense
from .conv_chain import Inner, _behind_relu, _inner_forward
from .layer import (
    NORM,
    PARAMETERS,
    Below,
    LayerGrads,
    Needs,
    SourceGrad,
    branch_backward,
    convolution_backward,
    is_idle,
    layer_backward,
    needs_of,
    normaliser_of,
)
from .saved import Packed, attached, fused_or_composed, keep, kept, kept_with_anchors, packed, unpacked
from .spec import ConvBN, LayerSpec, NormSpec, NormTensors

ELSEWHERE: Any = None
"""Stands for a tensor that is kept under another name."""


@dataclass(frozen=True)
class DenseLayerSpec:
    """A layer of a dense block: the batch norm of its input, its convolutions, each but the last with a batch norm."""

    norm: NormSpec
    layers: tuple[LayerSpec, ...]

    @property
    def fields(self) -> int:
        return NORM + PARAMETERS * len(self.layers)


@dataclass(frozen=True)
class DenseSpec(Holding):
    """``partials`` are the statistics of x, where its producer measured it."""

    layers: tuple[DenseLayerSpec, ...]
    schedule: Schedule
    partials: Partials | None = field(default=None, compare=False, repr=False)

    @property
    def compared(self) -> tuple[Any, ...]:
        layers = tuple((layer.norm, tuple(conv.compared for conv in layer.layers)) for layer in self.layers)
        return layers, self.schedule

    @property
    def held(self) -> tuple[Tensor | None, ...]:
        rounded = (conv.rounded for layer in self.layers for conv in layer.layers)
        return (*rounded, *(self.partials or ()))


class DenseTensors(NamedTuple):
    norm: NormTensors
    convs: tuple[ConvBN, ...]


class KeptLayer(NamedTuple):
    """``out`` is the rectified input, where it was written; ``inner`` the bottleneck; ``last`` as in `PreAct`;
    ``affine`` are gamma and beta of its input's batch norm.
    """

    norm: Normaliser
    out: Tensor | None
    inner: tuple[Inner, ...]
    last: ConvInput | None
    parameters: tuple[ConvBN, ...]
    affine: NormTensors


class Kept(NamedTuple):
    features: Tensor
    mean: Tensor | None
    layers: tuple[KeptLayer, ...]


class Dense(torch.autograd.Function):
    """z = x and every layer's output side by side, and the statistics of z where batch norms measure.

    ``apply(x, spec, *tensors)``: x (N, C, H, W); tensors are, for every layer, the fields of its input's `NormTensors`
    and of one `ConvBN` per convolution. Returns (z, counts, mean, m2), the latter the `Partials` of z or None each.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: DenseSpec, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        training = any(ctx.needs_input_grad)
        with no_autocast(x.device.type):
            z, partials, saved = replayed(_forward, x, spec, tensors, training)
        if saved is not None:
            ctx.spec, ctx.backend = replace(spec, partials=None), backends.current()
            ctx.channels, ctx.dtypes = x.shape[1], tuple(None if t is None else t.dtype for t in tensors)
            keep(ctx, saved, x)
        if partials is None:
            return z, None, None, None
        ctx.set_materialize_grads(False)  # nobody reads a gradient of statistics
        ctx.mark_non_differentiable(*partials)
        return z, *partials

    @staticmethod
    @fused_or_composed
    def backward(ctx: Any, dz: Tensor, *_: Any) -> tuple[Any, ...]:
        dx, grads = replayed(_backward, dz, ctx.spec, kept(ctx), ctx.needs_input_grad, ctx.channels, ctx.dtypes)
        return (dx, None, *grads)

    @staticmethod
    def composed(ctx: Any, dz: Tensor) -> Composed:
        saved: Kept
        saved, (anchor,) = kept_with_anchors(ctx)
        x = attached(saved.features[:, : ctx.channels], anchor)
        norms = [(layer.norm, *(step.branch.norm for step in layer.inner)) for layer in saved.layers]

        def form(x: Tensor, _: None, *tensors: Tensor | None) -> Tensor:
            return dense(x, ctx.spec, _by_layer(tensors, ctx.spec), norms)

        tensors = (t for layer in saved.layers for group in (layer.affine, *layer.parameters) for t in group)
        return Composed((x, None, *tensors), form)


def _by_layer(tensors: tuple[Any, ...], spec: DenseSpec) -> list[DenseTensors]:
    """A flat list of one entry per tensor, taken apart."""
    layers, at = [], 0
    for layer in spec.layers:
        starts = range(at + NORM, at + layer.fields, PARAMETERS)
        convs = tuple(ConvBN(*tensors[i : i + PARAMETERS]) for i in starts)
        layers.append(DenseTensors(NormTensors(*tensors[at : at + NORM]), convs))
        at += layer.fields
    return layers


class _Measured:
    """The statistics of a buffer's channels, filled in as its layers are written."""

    def __init__(self, features: Tensor) -> None:
        dtype, device = statistics_dtype(features.dtype), features.device
        self.count = torch.full((1,), pixels(features), dtype=dtype, device=device)
        self.mean, self.m2 = torch.empty((2, 1, features.shape[1]), dtype=dtype, device=device)

    def put(self, partials: Partials, first: int) -> None:
        _, mean, m2 = bn_combine(partials)
        places = slice(first, first + mean.shape[1])
        self.mean[:, places], self.m2[:, places] = mean, m2

    def of(self, channels: int) -> Partials:
        """Of the first channels."""
        return Partials(self.count, self.mean[:, :channels], self.m2[:, :channels])


def _forward(
    x: Tensor, spec: DenseSpec, tensors: tuple[Tensor | None, ...], training: bool
) -> tuple[Tensor, Partials | None, Packed | None]:
    """The features, their statistics, and the `Kept` if there is a backward pass."""
    layers = _by_layer(tensors, spec)
    n, channels, h, w = x.shape
    total = channels + sum(layer.convs[-1].weight.shape[0] for layer in layers)
    features = empty_rows(x, size=(n, total, h, w))
    put_features(features, x, 0)
    measured = None
    if any(layer.norm.batch_stats for layer in spec.layers):
        measured = _Measured(features)
        measured.put(bn_statistics(x) if spec.partials is None else spec.partials, 0)
    saved = []
    for layer, layer_spec in zip(layers, spec.layers, strict=True):
        end = channels + layer.convs[-1].weight.shape[0]
        out = features[:, channels:end]
        partials, step = _layer_forward(features[:, :channels], out, layer, layer_spec, spec, measured)
        if measured is not None and partials is not None:
            measured.put(partials, channels)
        saved.append(step)
        channels = end
    of_all = None if measured is None else measured.of(total)
    if not training:
        return features, of_all, None
    mean = None if measured is None else measured.mean[0]
    return features, of_all, packed(Kept(features, mean, tuple(saved)))


def _layer_forward(
    x: Tensor, out: Tensor, tensors: DenseTensors, layer: DenseLayerSpec, spec: DenseSpec, measured: _Measured | None
) -> tuple[Partials | None, KeptLayer]:
    """Writes a layer's raw ``out``; its statistics, and what its backward pass needs besides the features."""
    partials = measured.of(x.shape[1]) if measured is not None and layer.norm.batch_stats else None
    norm = normaliser_of(partials, tensors.norm, layer.norm, x.dtype)
    rectified, source = None, ConvInput(x, norm.scale, norm.shift)
    if not spec.schedule.prologue:
        rectified, _ = bn_act(x, norm.scale, norm.shift)
        source = ConvInput(rectified)
    u = source
    inner: list[Inner] = []
    for conv, conv_spec in zip(tensors.convs, layer.layers[:-1], strict=False):
        u, step = _inner_forward(u, conv, conv_spec, spec.schedule)
        # What the first convolution consumed is a slice of the features, or ``rectified``: kept as that alone.
        inner.append(step if inner else step._replace(branch=step.branch._replace(source=ConvInput(ELSEWHERE))))
    weight = layer.layers[-1].weight(tensors.convs[-1], x.dtype)
    _, of_y = conv_forward(u, weight, layer.layers[-1].geometry, statistics=measured is not None, out=out)
    last = u if inner else None
    learnt = tuple(conv.parameters for conv in tensors.convs)
    return of_y, KeptLayer(norm, rectified, tuple(inner), last, learnt, tensors.norm.affine)


def _backward(
    dz: Tensor, spec: DenseSpec, pack: Packed, asked_of: tuple[bool, ...], channels: int,
    dtypes: tuple[torch.dtype | None, ...],
) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:  # fmt: skip
    """The gradients of x, of ``channels`` channels, and of every tensor of the layers."""
    saved: Kept = unpacked(pack)
    features, mean = saved.features, saved.mean
    needed_x, flat = asked_of[0], asked_of[2:]
    asked, dtypes_of = _by_layer(flat, spec), _by_layer(dtypes, spec)
    # What layers send to the features: the first to send adds it to dz, the others to its sum in place.
    sent = channels_last(dz)
    into = empty_rows(sent)
    total_q, total_r = torch.zeros((2, features.shape[1]), dtype=statistics_dtype(dz.dtype), device=dz.device)
    ones = torch.ones_like(total_q)

    def arrived(first: int, end: int) -> OutputGrad:
        """The gradient of some channels, once all of their consumers have added theirs."""
        g = sent[:, first:end]
        if mean is None or sent is not into:
            return OutputGrad(channels_last(g))
        p, q, r, m = (vector[first:end] for vector in (ones, total_q, total_r, mean))
        return OutputGrad(bn_backward_apply(OutputGrad(g, y=features[:, first:end], p=p, q=q, r=r, mean=m)))

    below = needed_x
    needs = []
    for wanted in asked:
        needs.append(_needs(wanted, below))
        below = below or any(wanted.norm) or any(any(conv) for conv in wanted.convs)
    grads: list[list[Any]] = []
    end = features.shape[1]
    for i in range(len(spec.layers) - 1, -1, -1):
        layer, layer_spec, wanted = saved.layers[i], spec.layers[i], asked[i]
        first = end - layer.parameters[-1].weight.shape[0]
        head: list[Any] = [None] * NORM
        below_it = FeatureGrads(sent[:, :first], into[:, :first])
        convs, at_source = _layer_backward(
            arrived(first, end), features[:, :first], layer, layer_spec, spec.schedule, needs[i], below_it
        )
        if at_source is not None:
            sums, sent = at_source.sums, into
            for j, grad in enumerate((sums.sum_gy, sums.sum_g)):
                head[j] = grad.to(dtypes_of[i].norm[j]) if wanted.norm[j] else None
            if layer_spec.norm.batch_stats:
                total_q[:first] += sums.q
                total_r[:first] += sums.r
        grads.append([*head, *(grad for conv in convs for grad in conv)])
        end = first
    dx = None
    if needed_x:
        dx = arrived(0, channels).g
    return dx, tuple(grad for layer_grads in reversed(grads) for grad in layer_grads)


def _needs(asked: DenseTensors, below: bool) -> list[Needs]:
    """Per convolution of a layer what is asked for; ``below``: whether anything below the layer's input is."""
    source = below or any(asked.norm[:2])
    needs = []
    for conv in asked.convs:
        needs.append(needs_of(conv, source))  # type: ignore[arg-type]
        source = source or any(conv)
    return needs


def _layer_backward(
    dy: OutputGrad, x: Tensor, saved: KeptLayer, layer: DenseLayerSpec, schedule: Schedule, needs: list[Needs],
    features: FeatureGrads,
) -> tuple[list[LayerGrads], ProducerGrad | None]:  # fmt: skip
    """The gradients of a layer's convolutions, and the sums of what it added to that of the features."""
    source = ConvInput(x, saved.norm.scale, saved.norm.shift) if saved.out is None else ConvInput(saved.out)
    producers = [Producer(x, saved.norm)]
    for step in saved.inner:
        assert step.branch.y is not None
        producers.append(Producer(step.branch.y, step.branch.norm))
    grads = [LayerGrads()] * len(layer.layers)
    du: SourceGrad = None
    last = len(layer.layers) - 1
    for i in range(last, -1, -1):
        if not needs[i].any:
            return grads, None
        below = Below()
        if needs[i].source and schedule.statistics and (i == 0 or not is_idle(layer.layers[i - 1].norm, needs[i - 1])):
            below = Below(producer=producers[i], features=features if i == 0 else None)
        conv, conv_spec = saved.parameters[i], layer.layers[i]
        if i == last:
            consumed = source if saved.last is None else saved.last
            dweight, du = convolution_backward(dy, consumed, conv, conv_spec, needs[i], below)
            grads[i] = LayerGrads(None if dweight is None else dweight.to(conv.weight.dtype))
            continue
        branch, out = saved.inner[i]
        if i == 0:
            branch = branch._replace(source=source)
        if isinstance(du, ProducerGrad):
            grads[i], du = layer_backward(
                OutputGrad(du.g), du.sums, branch, conv, conv_spec, schedule, needs[i], below
            )  # fmt: skip
        else:
            assert du is not None
            grads[i], du = branch_backward(
                _behind_relu(du, out, branch), branch, conv, conv_spec, schedule, needs[i], below
            )
    if isinstance(du, Tensor):
        du = sent_to_features(at_producer(du, producers[0]), producers[0], features)
    return grads, du
