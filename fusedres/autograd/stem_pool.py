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
from ..ops.stem_contractions import early_weight_grad, output_contraction, pooled_contraction
from ..ops.stem_pool import stem_pool, stem_pool_backward
from ..replay import replayed
from .composed import Composed, stem
from .layer import Branch, LayerGrads, Needs, branch_backward, grouped, in_parameter_dtypes, measure, needs_of
from .saved import Packed, attached, fused_or_composed, keep, kept, kept_with_anchors, packed, unpacked
from .spec import ConvBN, StemSpec


class Early(NamedTuple):
    """What stands for y in the backward pass: E (K, C, R, S) and the mean of the windows (C, R, S)."""

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
        needed_x, training = ctx.needs_input_grad[0], any(ctx.needs_input_grad)
        with no_autocast(x.device.type):
            z, saved, size = replayed(_forward, x, spec, tensors, needed_x, training)
        if saved is not None:
            ctx.spec, ctx.backend, ctx.input_dtype, ctx.size = spec, backends.current(), x.dtype, size
            keep(ctx, saved, x)
        return z

    @staticmethod
    @fused_or_composed
    def backward(ctx: Any, dz: Tensor) -> tuple[Any, ...]:
        dx, grads = replayed(_backward, dz, ctx.spec, kept(ctx), ctx.size, ctx.input_dtype, ctx.needs_input_grad)
        return (dx, None, *grads)

    @staticmethod
    def composed(ctx: Any, dz: Tensor) -> Composed:
        saved: Kept
        saved, (anchor,) = kept_with_anchors(ctx)
        x = attached(saved.branch.source.tensor, anchor)

        def form(x: Tensor, _: None, *tensors: Tensor | None) -> Tensor:
            (layer,) = grouped(tensors)
            return stem(x, ctx.spec, layer, saved.branch.norm)

        return Composed((x, None, *saved.parameters), form)


def _forward(
    x: Tensor, spec: StemSpec, tensors: tuple[Tensor | None, ...], needed_x: bool, training: bool
) -> tuple[Tensor, Packed | None, tuple[int, ...]]:
    """z, the `Kept` if there is a backward pass, and the size of the convolution's output."""
    (layer,) = grouped(tensors)
    u = ConvInput(channels_last(x).to(spec.dtype))
    branch = measure(u, layer, spec.layer, spec.schedule)
    y = branch.y
    assert y is not None
    compact = spec.schedule.bit_masks
    z, index = stem_pool(y, branch.norm.scale, branch.norm.shift, spec.pool, compact=compact)
    if not training:
        return z, None, tuple(y.shape)
    assert index is not None
    early = None
    if spec.schedule.moments and not needed_x and spec.layer.geometry.groups == 1:
        if spec.layer.norm.batch_stats:
            window = (layer.weight.shape[2], layer.weight.shape[3])
            early = Early(*output_contraction(y, branch.norm.mean, u, window, spec.layer.geometry))
        branch = branch._replace(y=None)
    saved = Kept(branch, early, index, None if compact else z, layer.parameters)
    return z, packed(saved), tuple(y.shape)


def _backward(
    dz: Tensor, spec: StemSpec, pack: Packed, size: tuple[int, ...], input_dtype: torch.dtype,
    asked_of: tuple[bool, ...],
) -> tuple[Tensor | None, LayerGrads]:  # fmt: skip
    saved: Kept = unpacked(pack)
    branch, layer = saved.branch, saved.parameters
    needed = needs_of(asked_of[2:], asked_of[0])
    arriving = OutputGrad(dz.to(spec.dtype), saved.mask)
    if branch.y is None:
        return None, _backward_without_y(arriving, saved, size, spec, needed)
    g = OutputGrad(stem_pool_backward(arriving, saved.maxima, size, spec.pool))
    grads, dx = branch_backward(g, branch, layer, spec.layer, spec.schedule, needed)
    return dx.to(input_dtype) if isinstance(dx, Tensor) else None, grads


def _backward_without_y(
    arriving: OutputGrad, saved: Kept, size: tuple[int, ...], spec: StemSpec, needed: Needs
) -> LayerGrads:
    branch, layer, early = saved.branch, saved.parameters, saved.early
    window = (layer.weight.shape[2], layer.weight.shape[3])
    d, sum_g = pooled_contraction(arriving, saved.maxima, size, spec.pool, branch.source, window, spec.layer.geometry)
    weight, count = spec.layer.weight(layer, spec.dtype), size[0] * size[2] * size[3]
    product, mean = early or (None, None)
    small = early_weight_grad(d, sum_g, count, product, mean, weight, branch.norm)
    return in_parameter_dtypes(small.dweight, small.dgamma, sum_g, branch.norm, layer, spec.layer, needed)
