"""One convolution and its batch norm, forward and backward: the steps that the Functions share."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres.activation import Activation
from fusedres.operands import (
    ConvInput,
    Layer,
    Moments,
    Norm,
    Normaliser,
    NormNumbers,
    OutputGrad,
    Partials,
    Producer,
    statistics_dtype,
)
from fusedres.ops.bn_backward import (
    NormSums,
    bias_grad,
    bn_backward,
    bn_backward_apply,
    bn_backward_reduce,
    of_group,
    output_grad,
)
from fusedres.ops.bn_finalize import bn_finalize, bn_from_running, finalized_together
from fusedres.ops.bn_statistics import bn_statistics
from fusedres.ops.conv_backward import conv_backward, conv_producer_backward
from fusedres.ops.conv_bn_act import Contraction
from fusedres.ops.conv_forward import conv_forward
from fusedres.ops.conv_input_grad import ProducerGrad, conv_input_grad, conv_producer_grad
from fusedres.ops.conv_weight_grad import conv_weight_grad
from fusedres.ops.features import FeatureGrads
from fusedres.ops.input_moments import input_moments, measured_input, moments_statistics
from fusedres.ops.moments_backward import (
    MomentsSums,
    frozen_matrices,
    moments_backward,
    moments_input_grad,
    moments_producer_grad,
    moments_sums,
    shared_moments_backward,
)
from fusedres.ops.zero_pad_shortcut import Added, ZeroPaddedGrad
from fusedres.plan.schedule import Schedule


class Branch(NamedTuple):
    """A convolution measured for its batch norm: its input, and its raw output or (in the moments form) moments.

    Of one without a batch norm there is the input alone.
    """

    source: ConvInput
    norm: Normaliser | None = None
    y: Tensor | None = None
    moments: Moments | None = None

    @property
    def numbers(self) -> Normaliser:
        """Those of its batch norm."""
        assert self.norm is not None
        return self.norm

    @property
    def raw(self) -> Tensor:
        """Its output, which was written."""
        assert self.y is not None
        return self.y

    def producer(self, act: Activation) -> Producer:
        """What made the input of the layer behind it."""
        return Producer(self.raw, self.numbers, act=act)


class Needs(NamedTuple):
    """Which gradients of a layer somebody asked for."""

    weight: bool
    gamma: bool
    beta: bool
    bias: bool
    source: bool

    @property
    def any(self) -> bool:
        return True in self

    @staticmethod
    def of(asked: Sequence[bool], source: bool) -> "Needs":
        """From ``ctx.needs_input_grad`` of a layer's tensors, and whether its source's gradient is needed."""
        weight, gamma, beta, _, _, bias, _ = asked
        return Needs(weight, gamma, beta, bias, source)


class LayerGrads(NamedTuple):
    """A layer's gradients in the order of its tensors (running statistics have none)."""

    weight: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    running_mean: None = None
    running_var: None = None
    bias: Tensor | None = None
    counted: None = None


def is_idle(norm: NormNumbers, needs: Needs) -> bool:
    """Whether a batch norm is a constant scale and shift that nobody asked a gradient of: no sums are needed."""
    return not (norm.batch_stats or needs.gamma or needs.beta or needs.bias)


def normaliser_of(partials: Partials | None, norm: Norm, dtype: torch.dtype) -> Normaliser:
    """From the batch's statistics, moving the running ones, or from the running ones."""
    return bn_from_running(norm, statistics_dtype(dtype)) if partials is None else bn_finalize(partials, norm)


def share_one_group(*norms: NormNumbers) -> bool:
    """Whether batch norms take the batches of the same processes for one."""
    return all(norm.is_shared and norm.group is norms[0].group for norm in norms)


def measured_together(u: ConvInput, layers: Sequence[Layer], schedule: Schedule) -> list[Branch]:
    """`measure` of layers on one input that `share_one_group`, by one collective."""
    branches, partials = [], []
    for layer in layers:
        weight = layer.weight_in(u.tensor.dtype)
        if layer.moments:
            moments = input_moments(u, layer.geometry.stride)
            branches.append(Branch(u, moments=moments))
            partials.append(moments_statistics(moments, weight))
        else:
            y, of_y = conv_forward(u, weight, layer.geometry, statistics=schedule.statistics)
            branches.append(Branch(u, y=y))
            partials.append(bn_statistics(y) if of_y is None else of_y)
    every = finalized_together(partials, [layer.norm for layer in layers])
    return [branch._replace(norm=numbers) for branch, numbers in zip(branches, every, strict=True)]


def measure(u: ConvInput, layer: Layer, schedule: Schedule) -> Branch:
    """Convolve and measure, or in the moments form only measure."""
    weight, norm = layer.weight_in(u.tensor.dtype), layer.norm
    batch_stats = norm.numbers.batch_stats
    if layer.moments and not batch_stats:
        return Branch(u, normaliser_of(None, norm, weight.dtype))
    if layer.moments:
        moments, numbers = measured_input(u, weight, norm, layer.geometry.stride)
        return Branch(u, numbers, None, moments)
    y, partials = conv_forward(u, weight, layer.geometry, statistics=schedule.statistics and batch_stats)
    if batch_stats and partials is None:
        partials = bn_statistics(y)
    return Branch(u, normaliser_of(partials, norm, y.dtype), y)


def contraction(branch: Branch, layer: Layer) -> Contraction:
    """A moments-form branch as the operand of `conv_bn_act`."""
    weight = layer.weight_in(branch.source.tensor.dtype)
    return Contraction(branch.source, weight, layer.geometry, branch.numbers.scale, branch.numbers.shift)


SourceGrad = Tensor | ProducerGrad | None
"""The gradient of a layer's source, behind the activation of the layer below and with its sums where there is one."""


class Below(NamedTuple):
    """What is under a layer's source: a gradient that joins its own, and the layer that made it and wants its sums.

    ``compact``: the gradient at the pixels that a strided 1x1 convolution reads is enough, (N, C, P, Q). ``features``:
    where a producer's gradient is added instead of being written, a dense block's.
    """

    add: Added | None = None
    producer: Producer | None = None
    compact: bool = False
    features: FeatureGrads | None = None


def samples(layer: Layer) -> bool:
    """Whether a convolution leaves pixels of its source unread, every one between two that it reads."""
    stride, padding, _, _ = layer.geometry
    return layer.window == (1, 1) and padding == (0, 0) and stride != (1, 1)


class Summed(NamedTuple):
    """The sums of a branch's batch norm, and of the moments form what they were made with."""

    sums: NormSums
    moments: MomentsSums | None = None


def summed_together(
    g: OutputGrad, branches: Sequence[Branch], layers: Sequence[Layer], known: NormSums | None
) -> list[Summed]:
    """The sums of batch norms that `share_one_group` and are given the same gradient, by one collective.

    ``known``: this process's of the last, where they were made.
    """
    unknown = len(branches) - (known is not None)
    own = [_own_sums(g, *both) for both in zip(branches[:unknown], layers, strict=False)]
    if known is not None:
        own.append(Summed(known))
    every = of_group([each.sums for each in own], [branch.numbers for branch in branches])
    return [each._replace(sums=sums) for each, sums in zip(own, every, strict=True)]


def _own_sums(g: OutputGrad, branch: Branch, layer: Layer) -> Summed:
    """Of this process's pixels."""
    numbers = branch.numbers._replace(shared=None)
    if branch.moments is None:
        return Summed(bn_backward_reduce(g, branch.raw, numbers))
    weight = layer.weight_in(branch.source.tensor.dtype)
    own = moments_sums(g, branch.source, branch.moments, weight, numbers, layer.geometry)
    return Summed(NormSums(own.sum_g, own.sum_gy, own.sum_g, own.sum_g), own)


def projection_grad(
    g: OutputGrad, branch: Branch, layer: Layer, schedule: Schedule, needs: Needs, size: tuple[int, ...],
    summed: Summed | None = None,
) -> tuple[LayerGrads, Added | None]:  # fmt: skip
    """The gradients of a projection, and what it sends to its source of ``size``."""
    compact = samples(layer)
    grads, du = branch_backward(g, branch, layer, schedule, needs, Below(compact=compact), summed)
    if not isinstance(du, Tensor):
        return grads, None
    grad = OutputGrad(du, scratch=True)
    return grads, ZeroPaddedGrad(grad, size, layer.geometry.stride) if compact else grad


def convolution_backward(
    dy: OutputGrad, source: ConvInput, layer: Layer, needs: Needs, below: Below
) -> tuple[Tensor | None, SourceGrad]:
    """dW, laid out as the weight, and the source's gradient of a convolution, each if asked for."""
    dweight, du = _convolution_backward(dy, source, layer, needs, below)
    strides = layer.weight.stride()
    # Of a 1x1 weight the strides along its sides say nothing, but distributed training compares them.
    if dweight is not None and dweight.shape[2:] == (1, 1) and dweight.stride()[:2] == strides[:2]:
        dweight = dweight.as_strided(dweight.shape, strides)
    return dweight, du


def _convolution_backward(
    dy: OutputGrad, source: ConvInput, layer: Layer, needs: Needs, below: Below
) -> tuple[Tensor | None, SourceGrad]:
    weight, geometry = layer.weight_in(source.tensor.dtype), layer.geometry
    if below.compact and needs.source:
        at_read = (dy.g.shape[0], source.size[1], *dy.g.shape[2:])
        du = conv_input_grad(dy, weight, at_read, geometry._replace(stride=(1, 1)))
        return conv_weight_grad(dy, source, layer.window, geometry) if needs.weight else None, du
    if below.producer is not None:
        joins: dict[str, Any] = {"add": below.add, "features": below.features}
        if needs.weight:
            return conv_producer_backward(dy, source, weight, geometry, below.producer, **joins)
        return None, conv_producer_grad(dy, weight, geometry, below.producer, **joins)
    if needs.weight and needs.source:
        return conv_backward(dy, source, weight, geometry, add=below.add)
    if needs.weight:
        return conv_weight_grad(dy, source, layer.window, geometry), None
    if needs.source:
        return None, conv_input_grad(dy, weight, source.size, geometry, add=below.add)
    return None, None


def branch_backward(
    g: OutputGrad, branch: Branch, layer: Layer, schedule: Schedule, needs: Needs, below: Below,
    summed: Summed | None = None,
) -> tuple[LayerGrads, SourceGrad]:  # fmt: skip
    """The gradients of a branch's parameters and of its source, from the gradient g behind its batch norm.

    ``summed``: its sums, where they are known.
    """
    if branch.norm is None:
        return _bare_backward(g, branch, layer, needs, below)
    if branch.y is None:
        return _moments_backward(g, branch, layer, needs, below, summed)
    if summed is not None:
        return reduced_backward(g, summed.sums, branch, layer, schedule, needs, below)
    if is_idle(layer.norm.numbers, needs):
        scaled = output_grad(g, None, branch.y, branch.norm)
        if not schedule.prologue:
            scaled = OutputGrad(bn_backward_apply(scaled))
        return _bare_backward(scaled, branch, layer, needs, below)
    if schedule.statistics:
        sums = bn_backward_reduce(g, branch.y, branch.norm)
        return reduced_backward(g, sums, branch, layer, schedule, needs, below)
    norm, batch_stats = layer.norm, layer.norm.numbers.batch_stats
    dy, dgamma, dbeta = bn_backward(g, branch.y, branch.norm, norm.gamma, batch_stats=batch_stats)
    dweight, du = convolution_backward(OutputGrad(dy), branch.source, layer, needs, below)
    return in_parameter_dtypes(dweight, dgamma, dbeta, branch.norm, layer, needs), du


def _bare_backward(
    dy: OutputGrad, branch: Branch, layer: Layer, needs: Needs, below: Below
) -> tuple[LayerGrads, SourceGrad]:
    """Of a convolution whose output's gradient is there."""
    dweight, du = convolution_backward(dy, branch.source, layer, needs, below)
    return LayerGrads(None if dweight is None else dweight.to(layer.weight.dtype)), du


def reduced_backward(
    g: OutputGrad, sums: NormSums, branch: Branch, layer: Layer, schedule: Schedule, needs: Needs, below: Below
) -> tuple[LayerGrads, SourceGrad]:
    """As `branch_backward`, from a gradient that was already reduced; with prologues ops decide who forms dy."""
    norm = branch.numbers
    dy = output_grad(g, sums if layer.norm.numbers.batch_stats else None, branch.raw, norm)
    if not schedule.prologue:
        dy = OutputGrad(bn_backward_apply(dy))
    dweight, du = convolution_backward(dy, branch.source, layer, needs, below)
    return in_parameter_dtypes(dweight, sums.sum_gy, sums.sum_g, norm, layer, needs), du


def _moments_backward(
    g: OutputGrad, branch: Branch, layer: Layer, needs: Needs, below: Below, summed: Summed | None
) -> tuple[LayerGrads, SourceGrad]:
    weight, norm, geometry = layer.weight_in(branch.source.tensor.dtype), branch.numbers, layer.geometry
    if is_idle(layer.norm.numbers, needs) and not needs.weight:
        grads, matrices = LayerGrads(), frozen_matrices(weight, norm)
    else:
        if summed is None or summed.moments is None or branch.moments is None:
            small, matrices = moments_backward(g, branch.source, branch.moments, weight, norm, geometry)
        else:
            q, r = summed.sums.q, summed.sums.r
            small, matrices = shared_moments_backward(summed.moments, q, r, branch.moments, weight, norm)
        dweight = small.dweight.view(layer.weight.shape)
        grads = in_parameter_dtypes(dweight, small.dgamma, small.dbeta, norm, layer, needs)
    if below.producer is not None:
        return grads, moments_producer_grad(g, matrices, geometry, below.producer, add=below.add)
    if not needs.source:
        return grads, None
    return grads, moments_input_grad(g, matrices, branch.source, geometry, add=below.add, compact=below.compact)


def in_parameter_dtypes(
    dweight: Tensor | None, dgamma: Tensor, dbeta: Tensor, norm: Normaliser, layer: Layer, needs: Needs
) -> LayerGrads:
    """What was asked for, each in its parameter's dtype."""

    def cast(grad: Tensor | None, parameter: Tensor | None, needed: bool) -> Tensor | None:
        return grad.to(parameter.dtype) if needed and grad is not None and parameter is not None else None

    dbias = bias_grad(dbeta, norm, batch_stats=layer.norm.numbers.batch_stats) if needs.bias else None
    return LayerGrads(
        cast(dweight, layer.weight, needs.weight),
        cast(dgamma, layer.norm.gamma, needs.gamma),
        cast(dbeta, layer.norm.beta, needs.beta),
        bias=cast(dbias, layer.norm.bias, needs.bias),
    )
