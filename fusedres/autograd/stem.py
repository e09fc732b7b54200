"""The stem: convolution, batch norm, activation and max-pooling as one autograd node.

Under the moments schedule, where no gradient is asked for the image, the raw output y is not kept. The weight
gradient is linear in y, so y's part in it, E = sum((y - mean) u^T), is contracted in the forward pass while y is
there; it takes the place of W M in `moments_weight_grad`, with the mean of the input's windows beside it.
"""

from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.functional import max_pool2d

from fusedres.activation import Activation
from fusedres.autograd.composed import Composed, layered
from fusedres.autograd.function import FusedFunction, Given, Gradients, Passed
from fusedres.autograd.graph import Norms
from fusedres.autograd.layer import Below, Branch, LayerGrads, Needs, branch_backward, in_parameter_dtypes, measure
from fusedres.autograd.saved import Packed, attached, kept_with_anchors, pack, unpack
from fusedres.autograd.spec import StemSpec, norms_of
from fusedres.operands import Layer, OutputGrad
from fusedres.ops.contractions import conv_input
from fusedres.ops.conv_forward import conv_operand
from fusedres.ops.stem_contractions import early_weight_grad, output_contraction, pooled_contraction
from fusedres.ops.stem_pool import stem_pool, stem_pool_backward


class Early(NamedTuple):
    """What stands for y in the backward pass: E (K, C, R, S) and the mean of the windows (C, R, S)."""

    product: Tensor
    mean: Tensor


class Kept(NamedTuple):
    """``branch.y`` or ``early`` is there, or under frozen statistics neither; ``maxima`` are the indices, ``size`` that
    of y."""

    branch: Branch
    early: Early | None
    maxima: Tensor
    mask: Tensor | None
    parameters: tuple[Tensor | None, ...]
    size: tuple[int, ...]


def takes_stem(act: Activation) -> bool:
    """Whether pooling tells all of an activation's slope: by where its maxima are, and that it is 0 at the others."""
    return act.rises and not act.needs_input and act.closed == 0


class StemPool(FusedFunction):
    """z = maxpool(act(bn(conv(x)))), where `takes_stem` the activation.

    ``apply(x, None, spec, *tensors)``: x (N, C, H, W); tensors are those of one `Layer`.
    """

    op = "stem_pool"

    @staticmethod
    def norms(spec: StemSpec) -> Norms:
        return norms_of([spec.layer])

    @staticmethod
    def run(x: Tensor, residual: None, spec: StemSpec, tensors: tuple[Tensor | None, ...], under: None) -> Passed:
        layer = spec.layer.layer(tensors)
        u = conv_input(x, spec.dtype, layer, pack=spec.call.kernels)
        branch = measure(u, layer, spec.schedule)
        y, compact = branch.raw, spec.schedule.bit_masks
        scale, shift = branch.numbers.scale, branch.numbers.shift
        z, index = stem_pool(y, scale, shift, spec.pool, compact=compact, act=layer.act)
        if not spec.call.differentiated:
            return Passed(z)
        assert index is not None
        early = None
        # Statistics that are shared make dy of sums that no process knows in its forward pass.
        frees = spec.schedule.moments and not spec.images_grad and branch.numbers.shared is None
        if frees and layer.geometry.groups == 1:
            if layer.norm.numbers.batch_stats:
                early = Early(*output_contraction(y, branch.numbers.mean, u, layer.window, layer.geometry))
            branch = branch._replace(y=None)
        saved = Kept(branch, early, index, None if compact else z, layer.parameters, tuple(y.shape))
        return Passed(z, pack(saved))

    @staticmethod
    def go_back(dz: Tensor, sums: None, spec: StemSpec, pack: Packed, given: Given) -> Gradients:
        saved: Kept = unpack(pack)
        layer = spec.layer.layer(saved.parameters)
        needs = Needs.of(given.tensors, given.needed_x)
        arriving = OutputGrad(dz.to(spec.dtype), saved.mask, act=layer.act)
        if saved.branch.y is None:
            return Gradients(None, _without_y(arriving, saved, layer, spec, needs))
        g = OutputGrad(stem_pool_backward(arriving, saved.maxima, saved.size, spec.pool))
        grads, dx = branch_backward(g, saved.branch, layer, spec.schedule, needs, Below())
        return Gradients(dx.to(given.dtype) if isinstance(dx, Tensor) else None, grads)

    @staticmethod
    def composed(ctx: Any, dz: Tensor) -> Composed:
        saved: Kept
        saved, (anchor,) = kept_with_anchors(ctx)
        spec: StemSpec = ctx.spec

        def form(x: Tensor, residual: None, _: None, *tensors: Tensor | None) -> Tensor:
            z = layered(x.to(spec.dtype), spec.layer.layer(tensors), saved.branch.norm)
            return max_pool2d(spec.layer.act.value(z).to(spec.dtype), *spec.pool)

        x = attached(conv_operand(saved.branch.source), anchor)
        return Composed((x, None, None, *saved.parameters), form)


def _without_y(arriving: OutputGrad, saved: Kept, layer: Layer, spec: StemSpec, needs: Needs) -> LayerGrads:
    branch, size, window = saved.branch, saved.size, layer.window
    d, sum_g = pooled_contraction(arriving, saved.maxima, size, spec.pool, branch.source, window, layer.geometry)
    weight, count = layer.weight_in(spec.dtype), size[0] * size[2] * size[3]
    product, mean = saved.early or (None, None)
    small = early_weight_grad(d, sum_g, count, product, mean, weight, branch.numbers)
    return in_parameter_dtypes(small.dweight, small.dgamma, sum_g, branch.numbers, layer, needs)
