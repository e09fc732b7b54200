"""The pre-activation block as one autograd node: relu(bn(.)) is formed by whoever consumes it, before and after.

What is saved are raw tensors: x, y1, y2, ... and per-channel numbers. Passes over a bottleneck of width w (x and z
have 4w channels), in units of one w-channel tensor, on the rungs with a prologue. Forward: conv1 reads 4 and writes 1,
conv2 1 + 1, conv3 with the sum reads 1 + 4 and writes 4; z is measured as it is written, so that no pass reads it for
the next block's batch norm: 16, where eager has 50. Backward: each convolution's weight gradient and input gradient
read the arriving gradient and what they consumed, the latter masks and sums for the batch norm below; what remains at
x is dx = p * g + q * (x - mean) + r + dz, one pass (reads 12, writes 4).
"""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..autocast import no_autocast
from ..ops.add_act import add_act
from ..ops.bn_act import bn_act
from ..ops.bn_backward import added, bn_backward, bn_backward_apply, output_grad
from ..ops.bn_forward import bn_forward
from ..ops.bn_statistics import bn_statistics
from ..ops.contract import ConvInput, Normaliser, OutputGrad, Partials, Producer, channels_last
from ..ops.conv_bn_act import Contraction, conv_bn_act
from ..ops.conv_forward import conv_forward
from ..ops.conv_input_grad import ProducerGrad, at_producer, joined
from ..ops.zero_pad_shortcut import Added, ZeroPadded, ZeroPaddedGrad, written
from ..plan import Schedule
from ..replay import replayed
from .composed import Composed, preact
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
    grouped,
    is_idle,
    layer_backward,
    needs_of,
    normaliser_of,
    samples,
    shortcut_grad,
)
from .saved import Packed, attached, fused_or_composed, keep, kept, kept_with_anchors, packed, unpacked
from .spec import ConvBN, Layered, LayerSpec, NormSpec, NormTensors

BARE = NormSpec(batch_stats=False)
"""Of a convolution without a batch norm behind it."""


@dataclass(frozen=True)
class PreActSpec(Layered):
    """[bn-ReLU] conv-bn-ReLU-...-conv and what joins it.

    Attributes:
        norm: of the batch norm before the first convolution; None where x is activated already.
        layers: the convolutions, each but the last with the batch norm behind it.
        schedule: what is written to memory.
        dtype: of the contractions.
        shortcut: ``"none"``, ``"identity"`` or ``"zero_pad"`` of x, or ``"projection"`` of what the first
            convolution consumes.
        projection: the shortcut's convolution.
        zero_pad_stride: of the zero-pad shortcut.
        partials: the statistics of x, where its producer measured it.
        measured: whether the output is to be measured.
    """

    norm: NormSpec | None
    layers: tuple[LayerSpec, ...]
    schedule: Schedule
    dtype: torch.dtype
    shortcut: str = "identity"
    projection: LayerSpec | None = None
    zero_pad_stride: tuple[int, int] = (1, 1)
    partials: Partials | None = field(default=None, compare=False, repr=False)
    measured: bool = False

    @property
    def compared(self) -> tuple[Any, ...]:
        return (
            self.norm, self.compared_layers, self.schedule, self.dtype, self.shortcut, self.zero_pad_stride,
            self.measured,
        )  # fmt: skip

    @property
    def held(self) -> tuple[Tensor | None, ...]:
        return (*super().held, *(self.partials or ()))


class Kept(NamedTuple):
    """``source`` is what the first convolution consumed, ``last`` what the last one did."""

    x: Tensor | None
    norm: Normaliser | None
    gamma: Tensor | None
    beta: Tensor | None
    source: ConvInput
    inner: tuple[Inner, ...]
    last: ConvInput
    parameters: tuple[ConvBN, ...]


class PreAct(torch.autograd.Function):
    """z = conv(relu(bn(... conv(relu(bn(x)))))) + shortcut, and the statistics of z where they are asked for.

    ``apply(x, spec, *tensors)``: x (N, C, H, W); tensors are the fields of the first batch norm's `NormTensors`, then
    of one `ConvBN` per convolution, the projection's last. Returns (z, counts, mean, m2), the latter the `Partials`
    of z, each None if it was not measured.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: PreActSpec, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        training = any(ctx.needs_input_grad)
        with no_autocast(x.device.type):
            z, partials, saved = replayed(_forward, x, spec, tensors, training)
        if saved is not None:
            ctx.backend, ctx.size, ctx.input_dtype = backends.current(), tuple(x.shape), x.dtype
            ctx.norm_dtypes = tuple(None if tensor is None else tensor.dtype for tensor in tensors[:2])
            # The statistics of x were of use in the forward pass alone.
            ctx.spec = replace(spec, partials=None)
            keep(ctx, saved, x)
        if partials is None:
            return z, None, None, None
        ctx.set_materialize_grads(False)  # nobody reads a gradient of statistics
        ctx.mark_non_differentiable(*partials)
        return z, *partials

    @staticmethod
    @fused_or_composed
    def backward(ctx: Any, dz: Tensor, *_: Any) -> tuple[Any, ...]:
        dx, head, grads = replayed(
            _backward, dz, ctx.spec, kept(ctx), ctx.needs_input_grad, ctx.size, ctx.input_dtype, ctx.norm_dtypes
        )  # fmt: skip
        return (dx, None, *head, *grads)

    @staticmethod
    def composed(ctx: Any, dz: Tensor) -> Composed:
        saved: Kept
        saved, (anchor,) = kept_with_anchors(ctx)
        x = attached(saved.source.tensor if saved.x is None else saved.x, anchor)
        norms = [saved.norm, *(step.branch.norm for step in saved.inner)]

        def form(x: Tensor, _: None, *tensors: Tensor | None) -> Tensor:
            first, layers = NormTensors(*tensors[:NORM]), grouped(tensors[NORM:])
            return preact(x, ctx.spec, first, layers, norms)

        tensors = (tensor for layer in saved.parameters for tensor in layer)
        return Composed((x, None, *NormTensors(saved.gamma, saved.beta), *tensors), form)


def _activated(x: Tensor, spec: PreActSpec, tensors: NormTensors) -> tuple[ConvInput, Normaliser]:
    """relu(bn(x)), formed on load where prologues are."""
    assert spec.norm is not None
    numbers = spec.norm
    if numbers.batch_stats and spec.partials is None and not spec.schedule.statistics:
        out, _, norm = bn_forward(
            x, tensors.gamma, tensors.beta, tensors.running_mean, tensors.running_var, eps=numbers.eps,
            momentum=numbers.momentum, counted=tensors.counted,
        )  # fmt: skip
        return ConvInput(out.to(spec.dtype)), norm
    partials = spec.partials
    if numbers.batch_stats and partials is None:
        partials = bn_statistics(x)
    norm = normaliser_of(partials if numbers.batch_stats else None, tensors, numbers, x.dtype)
    if spec.schedule.prologue and x.dtype == spec.dtype:
        return ConvInput(x, norm.scale, norm.shift), norm
    return ConvInput(bn_act(x, norm.scale, norm.shift)[0].to(spec.dtype)), norm


def _end(
    x: Tensor, source: ConvInput, last: ConvInput, spec: PreActSpec, parameters: tuple[ConvBN, ...]
) -> tuple[Tensor, Partials | None]:
    """The last convolution and the sum, in one pass where the schedule has epilogues."""
    residual: Tensor | ZeroPadded | None = None
    if spec.shortcut == "identity":
        residual = x
    elif spec.shortcut == "zero_pad":
        residual = ZeroPadded(x, parameters[-1].weight.shape[0], spec.zero_pad_stride)
    last_spec = spec.layers[-1]
    weight = last_spec.weight(parameters[len(spec.layers) - 1], spec.dtype)
    if spec.schedule.statistics:
        second = None
        if spec.projection is not None:
            second = Contraction(source, spec.projection.weight(parameters[-1], spec.dtype), spec.projection.geometry)
        main = Contraction(last, weight, last_spec.geometry)
        z, _, partials = conv_bn_act(main, residual=residual, second=second, act=None, statistics=spec.measured)
        return z, partials
    z, _ = conv_forward(last, weight, last_spec.geometry)
    if spec.projection is not None:
        residual, _ = conv_forward(source, spec.projection.weight(parameters[-1], spec.dtype), spec.projection.geometry)
    joining = written(residual)
    return z if joining is None else add_act(z, joining, act=None)[0], None


def _forward(
    x: Tensor, spec: PreActSpec, tensors: tuple[Tensor | None, ...], training: bool
) -> tuple[Tensor, Partials | None, Packed | None]:
    """z, its statistics, and the `Kept` if there is a backward pass."""
    first, parameters = NormTensors(*tensors[:NORM]), tuple(grouped(tensors[NORM:]))
    x = channels_last(x)
    source, norm = (ConvInput(x.to(spec.dtype)), None) if spec.norm is None else _activated(x, spec, first)
    u, inner = source, []
    for layer, layer_spec in zip(parameters, spec.layers[:-1], strict=False):
        u, step = _inner_forward(u, layer, layer_spec, spec.schedule)
        inner.append(step)
    z, partials = _end(x, source, u, spec, parameters)
    if not training:
        return z, partials, None
    learnt = tuple(layer.parameters for layer in parameters)
    saved = Kept(None if norm is None else x, norm, first.gamma, first.beta, source, tuple(inner), u, learnt)
    return z, partials, packed(saved)


def _backward(
    dz: Tensor, spec: PreActSpec, pack: Packed, asked_of: tuple[bool, ...], size: tuple[int, ...],
    input_dtype: torch.dtype, norm_dtypes: tuple[torch.dtype | None, ...],
) -> tuple[Tensor | None, tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:  # fmt: skip
    """The gradients of x, of the first batch norm's tensors and of every convolution's."""
    saved: Kept = unpacked(pack)
    needed_x, flat = asked_of[0], asked_of[2:]
    asked = [flat[i : i + PARAMETERS] for i in range(NORM, len(flat), PARAMETERS)]
    count = len(spec.layers)
    at_source = needed_x or any(flat[:2])
    needs, below = [], at_source
    for of_layer in asked[:count]:
        needs.append(needs_of(of_layer, below))
        below = below or any(of_layer)

    dz = channels_last(dz)
    g = OutputGrad(dz.to(spec.dtype))
    grads: list[LayerGrads] = [LayerGrads()] * len(saved.parameters)
    at_input: Added | None = None
    if spec.projection is not None:
        wanted = needs_of(asked[-1], at_source)
        layer, projection = saved.parameters[-1], spec.projection
        below_it = Below(compact=samples(layer, projection))
        dweight, du = convolution_backward(g, saved.source, layer, projection, wanted, below_it)
        grads[-1] = _weight_alone(dweight, layer)
        at_input = shortcut_grad(du, size, layer, projection)
    elif spec.shortcut == "identity":
        at_input = OutputGrad(dz)
    elif spec.shortcut == "zero_pad" and needed_x:
        at_input = ZeroPaddedGrad(OutputGrad(dz), size, spec.zero_pad_stride)

    # A projection took what the first convolution consumed, the other shortcuts took x.
    with_first = at_input if at_source and (spec.norm is None or spec.projection is not None) else None
    du = _through(saved, spec, needs, g, grads, with_first)
    head: list[Tensor | None] = [None] * NORM
    dx = du if isinstance(du, Tensor) else None
    if spec.norm is not None and du is not None:
        shortcut = at_input if needed_x and spec.projection is None else None
        dx, dgamma, dbeta = _at_x(du, saved, spec, shortcut)
        for i, grad in enumerate((dgamma, dbeta)):
            head[i] = grad.to(norm_dtypes[i]) if flat[i] else None
    elif du is None and needed_x and at_input is not None:
        dx = added(at_input)
    out = dx.to(input_dtype) if needed_x and dx is not None else None
    return out, tuple(head), tuple(grad for layer_grads in grads for grad in layer_grads)


def _weight_alone(dweight: Tensor | None, layer: ConvBN) -> LayerGrads:
    return LayerGrads(None if dweight is None else dweight.to(layer.weight.dtype))


def _through(
    saved: Kept, spec: PreActSpec, needs: list[Needs], g: OutputGrad, grads: list[LayerGrads], add: Added | None
) -> SourceGrad:
    """The gradient at what the first convolution consumed, ``add`` joined; fills ``grads`` on its way."""
    schedule, last = spec.schedule, len(spec.layers) - 1
    du: SourceGrad = None
    for i in range(last, -1, -1):
        if not needs[i].any:
            return None
        below = Below(add if i == 0 else None)
        under = _under(saved, spec, i, needs)
        if under is not None and needs[i].source and schedule.statistics:
            below = Below(below.add, under)
        layer, layer_spec = saved.parameters[i], spec.layers[i]
        if i == last:
            dweight, du = convolution_backward(g, saved.last, layer, layer_spec, needs[i], below)
            grads[i] = _weight_alone(dweight, layer)
            continue
        branch, out = saved.inner[i]
        if isinstance(du, ProducerGrad):
            arrived = OutputGrad(du.g)
            grads[i], du = layer_backward(arrived, du.sums, branch, layer, layer_spec, schedule, needs[i], below)
        else:
            assert du is not None
            arrived = _behind_relu(du, out, branch)
            grads[i], du = branch_backward(arrived, branch, layer, layer_spec, schedule, needs[i], below)
    return du


def _under(saved: Kept, spec: PreActSpec, i: int, needs: list[Needs]) -> Producer | None:
    """The batch norm and ReLU before convolution ``i``, if a gradient is to be summed for them."""
    if i > 0:
        branch = saved.inner[i - 1].branch
        assert branch.y is not None
        return None if is_idle(spec.layers[i - 1].norm, needs[i - 1]) else Producer(branch.y, branch.norm)
    if saved.x is None or saved.norm is None or saved.x.dtype != spec.dtype:
        return None
    return Producer(saved.x, saved.norm)


def _at_x(
    du: Tensor | ProducerGrad, saved: Kept, spec: PreActSpec, shortcut: Added | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dgamma and dbeta of the first batch norm, the shortcut's gradient joined."""
    assert saved.x is not None and saved.norm is not None and spec.norm is not None
    x, norm = saved.x, saved.norm
    if isinstance(du, Tensor) and (spec.schedule.statistics or saved.source.scale is not None):
        du = at_producer(du.to(x.dtype), Producer(x, norm))
    if isinstance(du, ProducerGrad):
        dy = output_grad(OutputGrad(du.g), du.sums if spec.norm.batch_stats else None, x, norm)
        return bn_backward_apply(dy, add=shortcut), du.sums.sum_gy, du.sums.sum_g
    g = OutputGrad(du.to(x.dtype), saved.source.tensor.to(x.dtype), scratch=True)
    dx, dgamma, dbeta = bn_backward(g, x, norm, saved.gamma, batch_stats=spec.norm.batch_stats)
    return joined(dx, shortcut), dgamma, dbeta
