"""One convolution and its batch norm, forward and backward: the steps that the Functions share."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.bn_backward import NormSums, bn_backward, bn_backward_apply, bn_backward_reduce, output_grad
from ..ops.bn_finalize import bn_finalize, bn_from_running
from ..ops.bn_statistics import bn_statistics
from ..ops.contract import (
    ConvInput,
    Moments,
    Normaliser,
    OutputGrad,
    Partials,
    Producer,
    RunningNorm,
    statistics_dtype,
)
from ..ops.conv_backward import conv_backward, conv_producer_backward
from ..ops.conv_bn_act import Contraction
from ..ops.conv_forward import conv_forward
from ..ops.conv_input_grad import ProducerGrad, conv_input_grad, conv_producer_grad
from ..ops.conv_weight_grad import conv_weight_grad
from ..ops.features import FeatureGrads
from ..ops.input_moments import input_moments, moments_finalize
from ..ops.moments_backward import (
    frozen_matrices,
    moments_backward,
    moments_contraction,
    moments_input_grad,
    moments_producer_grad,
)
from ..ops.zero_pad_shortcut import Added, ZeroPaddedGrad
from ..plan import Schedule
from .spec import ConvBN, LayerSpec, NormSpec, NormTensors

PARAMETERS = len(ConvBN._fields)
NORM = len(NormTensors._fields)


class Branch(NamedTuple):
    """A convolution measured for its batch norm: its input, and its raw output or (in the moments form) moments."""

    source: ConvInput
    norm: Normaliser
    y: Tensor | None
    moments: Moments | None


class Needs(NamedTuple):
    """Which gradients of a layer somebody asked for."""

    weight: bool
    bias: bool
    gamma: bool
    beta: bool
    source: bool

    @property
    def any(self) -> bool:
        return True in self


def needs_of(asked: Sequence[bool], source: bool) -> Needs:
    """From ``ctx.needs_input_grad`` of a layer's `ConvBN` tensors, and whether its source's gradient is needed."""
    weight, bias, gamma, beta = asked[:4]
    return Needs(weight, bias, gamma, beta, source)


class LayerGrads(NamedTuple):
    """A layer's gradients in the order of `ConvBN` (running statistics have none)."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    running_mean: None = None
    running_var: None = None
    counted: None = None


def grouped(tensors: tuple[Tensor | None, ...]) -> list[ConvBN]:
    """A flat argument list back as one `ConvBN` per layer."""
    return [ConvBN(*tensors[i : i + PARAMETERS]) for i in range(0, len(tensors), PARAMETERS)]  # type: ignore[arg-type]


def is_idle(norm: NormSpec, needs: Needs) -> bool:
    """Whether a batch norm is a constant scale and shift that nobody asked a gradient of: no sums are needed."""
    return not (norm.batch_stats or needs.gamma or needs.beta or needs.bias)


def normaliser_of(partials: Partials | None, tensors: NormTensors, spec: NormSpec, dtype: torch.dtype) -> Normaliser:
    """From the batch's statistics, moving the running ones, or from the running ones."""
    gamma, beta, running_mean, running_var, bias, counted = tensors
    if partials is not None:
        return bn_finalize(
            partials, gamma, beta, running_mean, running_var, bias=bias, eps=spec.eps, momentum=spec.momentum,
            counted=counted,
        )  # fmt: skip
    assert running_mean is not None and running_var is not None
    running = RunningNorm(running_mean, running_var, gamma, beta, bias, spec.eps)
    return bn_from_running(running, statistics_dtype(dtype))


def measure(u: ConvInput, layer: ConvBN, spec: LayerSpec, schedule: Schedule) -> Branch:
    """Convolve and measure, or in the moments form only measure."""
    weight = spec.weight(layer, u.tensor.dtype)
    if spec.moments and not spec.norm.batch_stats:
        return Branch(u, normaliser_of(None, layer.norm, spec.norm, weight.dtype), None, None)
    if spec.moments:
        moments = input_moments(u, spec.geometry.stride)
        gamma, beta, running_mean, running_var, bias, counted = layer.norm
        norm = moments_finalize(
            moments, weight, gamma, beta, running_mean, running_var, bias=bias, eps=spec.norm.eps,
            momentum=spec.norm.momentum, counted=counted,
        )  # fmt: skip
        return Branch(u, norm, None, moments)
    y, partials = conv_forward(u, weight, spec.geometry, statistics=schedule.statistics and spec.norm.batch_stats)
    if spec.norm.batch_stats and partials is None:
        partials = bn_statistics(y)
    return Branch(u, normaliser_of(partials, layer.norm, spec.norm, y.dtype), y, None)


def contraction(branch: Branch, layer: ConvBN, spec: LayerSpec) -> Contraction:
    """A moments-form branch as the operand of `conv_bn_act`."""
    weight = spec.weight(layer, branch.source.tensor.dtype)
    return Contraction(branch.source, weight, spec.geometry, branch.norm.scale, branch.norm.shift)


SourceGrad = Tensor | ProducerGrad | None
"""The gradient of a layer's source, behind the ReLU of the layer below and with its sums where there is one."""


class Below(NamedTuple):
    """What is under a layer's source: a gradient that joins its own, and the layer that made it and wants its sums.

    ``compact``: the gradient at the pixels that a strided 1x1 convolution reads is enough, (N, C, P, Q). ``features``:
    where a producer's gradient is added instead of being written, a dense block's.
    """

    add: Added | None = None
    producer: Producer | None = None
    compact: bool = False
    features: FeatureGrads | None = None


def samples(layer: ConvBN, spec: LayerSpec) -> bool:
    """Whether a convolution leaves pixels of its source unread, every one between two that it reads."""
    stride, padding, _, _ = spec.geometry
    return layer.weight.shape[2:] == (1, 1) and padding == (0, 0) and stride != (1, 1)


def shortcut_grad(du: SourceGrad, size: tuple[int, ...], layer: ConvBN, spec: LayerSpec) -> Added | None:
    """What a projection sends to its source of ``size``, computed with ``Below(compact=samples(layer, spec))``."""
    if not isinstance(du, Tensor):
        return None
    grad = OutputGrad(du, scratch=True)
    return ZeroPaddedGrad(grad, size, spec.geometry.stride) if samples(layer, spec) else grad


def convolution_backward(
    dy: OutputGrad, source: ConvInput, layer: ConvBN, spec: LayerSpec, needs: Needs, below: Below
) -> tuple[Tensor | None, SourceGrad]:
    """dW, laid out as the weight, and the source's gradient of a convolution, each if asked for."""
    dweight, du = _convolution_backward(dy, source, layer, spec, needs, below)
    strides = layer.weight.stride()
    # Of a 1x1 weight the strides along its sides say nothing, but distributed training compares them.
    if dweight is not None and dweight.shape[2:] == (1, 1) and dweight.stride()[:2] == strides[:2]:
        dweight = dweight.as_strided(dweight.shape, strides)
    return dweight, du


def _convolution_backward(
    dy: OutputGrad, source: ConvInput, layer: ConvBN, spec: LayerSpec, needs: Needs, below: Below
) -> tuple[Tensor | None, SourceGrad]:
    weight = spec.weight(layer, source.tensor.dtype)
    window = (weight.shape[2], weight.shape[3])
    if below.compact and needs.source:
        at_read = (dy.g.shape[0], source.tensor.shape[1], *dy.g.shape[2:])
        du = conv_input_grad(dy, weight, at_read, spec.geometry._replace(stride=(1, 1)))
        return conv_weight_grad(dy, source, window, spec.geometry) if needs.weight else None, du
    if below.producer is not None:
        joins: dict[str, Any] = {"add": below.add, "features": below.features}
        if needs.weight:
            return conv_producer_backward(dy, source, weight, spec.geometry, below.producer, **joins)
        return None, conv_producer_grad(dy, weight, spec.geometry, below.producer, **joins)
    if needs.weight and needs.source:
        return conv_backward(dy, source, weight, spec.geometry, add=below.add)
    if needs.weight:
        return conv_weight_grad(dy, source, window, spec.geometry), None
    if needs.source:
        return None, conv_input_grad(dy, weight, tuple(source.tensor.shape), spec.geometry, add=below.add)
    return None, None


def branch_backward(
    g: OutputGrad, branch: Branch, layer: ConvBN, spec: LayerSpec, schedule: Schedule, needs: Needs,
    below: Below | None = None,
) -> tuple[LayerGrads, SourceGrad]:  # fmt: skip
    """The gradients of a branch's parameters and of its source, from the gradient g behind its batch norm."""
    below = below or Below()
    if branch.y is None:
        return _moments_branch_backward(g, branch, layer, spec, needs, below)
    if is_idle(spec.norm, needs):
        scaled = output_grad(g, None, branch.y, branch.norm)
        if not schedule.prologue:
            scaled = OutputGrad(bn_backward_apply(scaled))
        dweight, du = convolution_backward(scaled, branch.source, layer, spec, needs, below)
        return LayerGrads(None if dweight is None else dweight.to(layer.weight.dtype)), du
    if schedule.statistics:
        sums = bn_backward_reduce(g, branch.y, branch.norm)
        return layer_backward(g, sums, branch, layer, spec, schedule, needs, below)
    dy, dgamma, dbeta = bn_backward(g, branch.y, branch.norm, layer.gamma, batch_stats=spec.norm.batch_stats)
    dweight, du = convolution_backward(OutputGrad(dy), branch.source, layer, spec, needs, below)
    return in_parameter_dtypes(dweight, dgamma, dbeta, branch.norm, layer, spec, needs), du


def layer_backward(
    g: OutputGrad, sums: NormSums, branch: Branch, layer: ConvBN, spec: LayerSpec, schedule: Schedule, needs: Needs,
    below: Below,
) -> tuple[LayerGrads, SourceGrad]:  # fmt: skip
    """As `branch_backward`, from a gradient that was already reduced; with prologues ops decide who forms dy."""
    assert branch.y is not None
    dy = output_grad(g, sums if spec.norm.batch_stats else None, branch.y, branch.norm)
    if not schedule.prologue:
        dy = OutputGrad(bn_backward_apply(dy))
    dweight, du = convolution_backward(dy, branch.source, layer, spec, needs, below)
    return in_parameter_dtypes(dweight, sums.sum_gy, sums.sum_g, branch.norm, layer, spec, needs), du


def _moments_branch_backward(
    g: OutputGrad, branch: Branch, layer: ConvBN, spec: LayerSpec, needs: Needs, below: Below
) -> tuple[LayerGrads, SourceGrad]:
    weight = spec.weight(layer, branch.source.tensor.dtype)
    if is_idle(spec.norm, needs) and not needs.weight:
        grads, matrices = LayerGrads(), frozen_matrices(weight, branch.norm)
    else:
        d, sum_g = moments_contraction(g, branch.source, (1, 1), spec.geometry)
        small, matrices = moments_backward(d, sum_g, branch.moments, weight, branch.norm)
        dweight = small.dweight.view(layer.weight.shape)
        grads = in_parameter_dtypes(dweight, small.dgamma, small.dbeta, branch.norm, layer, spec, needs)
    if below.producer is not None:
        return grads, moments_producer_grad(g, matrices, spec.geometry, below.producer, add=below.add)
    if not needs.source:
        return grads, None
    return grads, moments_input_grad(g, matrices, branch.source, spec.geometry, add=below.add, compact=below.compact)


def in_parameter_dtypes(
    dweight: Tensor | None, dgamma: Tensor, dbeta: Tensor, norm: Normaliser, layer: ConvBN, spec: LayerSpec,
    needs: Needs,
) -> LayerGrads:  # fmt: skip
    """What was asked for, each in its parameter's dtype."""

    def cast(grad: Tensor | None, parameter: Tensor | None, needed: bool) -> Tensor | None:
        return grad.to(parameter.dtype) if needed and grad is not None and parameter is not None else None

    dbias = None
    if needs.bias:
        # Under batch statistics a constant added before the normalisation changes nothing.
        dbias = torch.zeros_like(dbeta) if spec.norm.batch_stats else norm.scale * dbeta
    return LayerGrads(
        cast(dweight, layer.weight, needs.weight),
        cast(dbias, layer.bias, needs.bias),
        cast(dgamma, layer.gamma, needs.gamma),
        cast(dbeta, layer.beta, needs.beta),
    )
