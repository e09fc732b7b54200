"""The stem: convolution, batch norm, ReLU and max-pooling as one autograd node.

Under the moments schedule, where no gradient is asked for the image, the raw output y is not kept. The weight
gradient is linear in y, so y's part in it, E = sum((y - mean) u^T), is contracted in the forward pass while y is
there; it takes the place of W M in `moments_weight_grad`, with the mean of the input's windows beside it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..autocast import no_autocast
from ..ops.contract import ConvInput, OutputGrad, channels_last
from ..ops.moments_backward import frozen_weight_grad, moments_weight_grad
from ..ops.stem_contractions import output_contraction, pooled_contraction
from ..ops.stem_pool import stem_pool, stem_pool_backward
from .layer import Branch, LayerGrads, Needs, branch_backward, grouped, in_parameter_dtypes, measure, needs_of
from .saved import differentiable_once, keep, kept, on_forward_backend
from .spec import ConvBN, StemSpec


class Early(NamedTuple):
    """What stands for y in the backward pass: E (K, C R S) and the mean of the windows (C R S,)."""

    product: Tensor
    mean: Tensor


class Kept(NamedTuple):
    """``branch.y`` or ``early`` is there, or under frozen statistics neither; ``maxima`` are the indices."""

    branch: Branch
    early: Early | None
    maxima: Tensor
    mask: Tensor | None
    parameters: ConvBN


class StemPool(torch.autograd.Function):
    """z = maxpool(relu(bn(conv(x)))).

    ``apply(x, spec, *tensors)``: x (N, C, H, W); tensors are the fields of one `ConvBN`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: StemSpec, *tensors: Tensor | None) -> Tensor:
        with no_autocast(x.device.type):
            return _forward(ctx, x, spec, grouped(tensors)[0])

    @staticmethod
    @differentiable_once
    @on_forward_backend
    def backward(ctx: Any, dz: Tensor) -> tuple[Any, ...]:
        return _backward(ctx, dz)


def _forward(ctx: Any, x: Tensor, spec: StemSpec, layer: ConvBN) -> Tensor:
    u = ConvInput(channels_last(x).to(spec.dtype))
    branch = measure(u, layer, spec.layer, spec.schedule)
    assert branch.y is not None
    compact = spec.schedule.bit_masks
    z, index = stem_pool(branch.y, branch.norm.scale, branch.norm.shift, spec.pool, compact=compact)
    if any(ctx.needs_input_grad):
        assert index is not None
        ctx.spec, ctx.backend, ctx.input_dtype = spec, backends.current(), x.dtype
        ctx.size = tuple(branch.y.shape)
        early = None
        if spec.schedule.moments and not ctx.needs_input_grad[0] and spec.layer.geometry.groups == 1:
            if spec.layer.norm.batch_stats:
                window = (layer.weight.shape[2], layer.weight.shape[3])
                early = Early(*output_contraction(branch.y, branch.norm.mean, u, window, spec.layer.geometry))
            branch = branch._replace(y=None)
        keep(ctx, Kept(branch, early, index, None if compact else z, layer.parameters))
    return z


def _backward(ctx: Any, dz: Tensor) -> tuple[Any, ...]:
    spec: StemSpec = ctx.spec
    saved: Kept = kept(ctx)
    branch, layer = saved.branch, saved.parameters
    needed = needs_of(ctx.needs_input_grad[2:], ctx.needs_input_grad[0])
    arriving = OutputGrad(dz.to(spec.dtype), saved.mask)
    if branch.y is not None:
        g = OutputGrad(stem_pool_backward(arriving, saved.maxima, ctx.size, spec.pool))
        grads, dx = branch_backward(g, branch, layer, spec.layer, spec.schedule, needed)
        return (dx.to(ctx.input_dtype) if isinstance(dx, Tensor) else None, None, *grads)
    return (None, None, *_backward_without_y(arriving, saved, ctx.size, spec, needed))


def _backward_without_y(
    arriving: OutputGrad, saved: Kept, size: tuple[int, ...], spec: StemSpec, needed: Needs
) -> LayerGrads:
    branch, layer, early = saved.branch, saved.parameters, saved.early
    window = (layer.weight.shape[2], layer.weight.shape[3])
    d, sum_g = pooled_contraction(arriving, saved.maxima, size, spec.pool, branch.source, window, spec.layer.geometry)
    weight = spec.layer.weight(layer, spec.dtype).flatten(1).to(d.dtype)
    if early is None:
        dweight, dgamma = frozen_weight_grad(d, sum_g, weight, branch.norm)
    else:
        count = size[0] * size[2] * size[3]
        dweight, dgamma, _ = moments_weight_grad(d, sum_g, count, early.mean, early.product, weight, branch.norm)
    dweight = dweight.view(layer.weight.shape)
    return in_parameter_dtypes(dweight, dgamma, sum_g, branch.norm, layer, spec.layer, needed)
