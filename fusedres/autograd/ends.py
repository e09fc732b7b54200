"""The ends of blocks on their own: add the shortcut, normalised or not, and activate."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.functional import prelu

from fusedres.activation import RELU, Activation
from fusedres.autograd.composed import Composed, joining, normalised
from fusedres.autograd.function import FusedFunction, Given, Gradients, Passed
from fusedres.autograd.graph import Norms
from fusedres.autograd.layer import normaliser_of, share_one_group
from fusedres.autograd.layouts import in_dtype
from fusedres.autograd.saved import Packed, attached, kept_with_anchors, pack, unpack
from fusedres.operands import NORM_TENSORS, Norm, Normaliser, NormNumbers, OutputGrad, Partials
from fusedres.ops.add_act import add_act
from fusedres.ops.bn_act import bn_act
from fusedres.ops.bn_backward import (
    bn_backward,
    bn_backward_apply,
    bn_backward_reduce,
    masked_gradient,
    of_group,
    output_grad,
)
from fusedres.ops.bn_finalize import finalized_together
from fusedres.ops.bn_prelu import bn_prelu, bn_prelu_backward
from fusedres.ops.bn_statistics import bn_statistics
from fusedres.ops.rows import channels_last
from fusedres.runtime.call import Call
from fusedres.runtime.holding import HELD, Holding
from fusedres.runtime.text import known


@dataclass(frozen=True)
class AddActSpec(Holding):
    """What was decided at the door, and the activation."""

    call: Call
    act: Activation = RELU


class AddAct(FusedFunction):
    """z = act(x + residual).

    ``apply(x, residual, spec)``: x and residual (N, C, H, W). Only the activation's mask is kept.
    """

    op = "add_act"

    @staticmethod
    def norms(spec: AddActSpec) -> Norms:
        return ()

    @staticmethod
    def anchored(x: Tensor, residual: Tensor | None, spec: AddActSpec) -> tuple[()]:
        return ()

    @staticmethod
    def summands(x: Tensor, residual: Tensor | None, spec: AddActSpec) -> tuple[Tensor | None, ...]:
        return (x, residual) if spec.act.needs_input else (None, None)

    @staticmethod
    def run(x: Tensor, residual: Tensor, spec: AddActSpec, tensors: tuple[()], under: None) -> Passed:
        bit_mask = spec.call.differentiated and not spec.act.is_identity
        z, mask = add_act(channels_last(x), channels_last(residual), act=spec.act, bit_mask=bit_mask)
        return Passed(z, pack((mask,)) if spec.call.differentiated else None)

    @staticmethod
    def go_back(dz: Tensor, sums: None, spec: AddActSpec, pack: Packed, given: Given) -> Gradients:
        (mask,) = unpack(pack)
        g = masked_gradient(OutputGrad(channels_last(dz), mask, act=spec.act))
        dx = g.to(given.dtype) if given.needed_x else None
        return Gradients(dx, dresidual=g.to(given.residual_dtype) if given.needed_residual else None)

    @staticmethod
    def composed(ctx: Any, dz: Tensor) -> Composed:
        (mask,), (of_x, of_residual) = kept_with_anchors(ctx)
        inputs = (joining(dz, ctx.given.dtype, of_x), joining(dz, ctx.given.residual_dtype, of_residual), None)
        return Composed(inputs, lambda x, residual, _: x + residual, mask, ctx.spec.act)


@dataclass(frozen=True)
class BNAddActSpec(Holding):
    """``residual_norm`` is None where the residual joins as it is; ``partials`` are y's where they were measured."""

    call: Call
    norm: NormNumbers
    residual_norm: NormNumbers | None = None
    act: Activation = RELU
    partials: Partials | None = field(default=None, compare=False, repr=False, metadata=HELD)

    @property
    def are_together(self) -> bool:
        """Whether both batch norms wait for the same processes."""
        return self.residual_norm is not None and share_one_group(self.norm, self.residual_norm)

    def norms(self, tensors: tuple[Tensor | None, ...]) -> tuple[Norm, Norm]:
        """Of y and of the residual."""
        other = self.residual_norm or NormNumbers(batch_stats=False)
        return Norm.of(tensors[:NORM_TENSORS], self.norm), Norm.of(tensors[NORM_TENSORS:], other)


class Kept(NamedTuple):
    y: Tensor
    numbers: Normaliser
    residual: Tensor | None
    residual_numbers: Normaliser | None
    mask: Tensor | None
    affine: tuple[Tensor | None, ...]


class BNAddAct(FusedFunction):
    """z = act(bn(y) + residual), or act(bn(y) + bn'(residual)).

    ``apply(y, residual, spec, *tensors)``: y and residual (N, K, P, Q), residual may be None; tensors are those of two
    `Norm`, of y and of the residual.
    """

    op = "bn_add_act"

    @staticmethod
    def norms(spec: BNAddActSpec) -> Norms:
        other = spec.residual_norm
        return [(0, spec.norm), *([] if other is None else [(NORM_TENSORS, other)])]

    @staticmethod
    def anchored(x: Tensor, residual: Tensor | None, spec: BNAddActSpec) -> tuple[Tensor | None, ...]:
        return x, residual if spec.residual_norm is not None else None

    @staticmethod
    def summands(x: Tensor, residual: Tensor | None, spec: BNAddActSpec) -> tuple[Tensor | None, ...]:
        return (residual if spec.residual_norm is None and spec.act.needs_input else None,)

    @staticmethod
    def run(
        y: Tensor, residual: Tensor | None, spec: BNAddActSpec, tensors: tuple[Tensor | None, ...], under: None
    ) -> Passed:
        main, other = spec.norms(tensors)
        y = channels_last(y)
        residual_numbers = None
        if residual is not None:
            residual = channels_last(residual)
        if residual is not None and spec.are_together:
            partials = bn_statistics(y) if spec.partials is None else spec.partials
            numbers, residual_numbers = finalized_together([partials, bn_statistics(residual)], [main, other])
        else:
            numbers = _measured(y, main, spec.partials)
            if residual is not None and spec.residual_norm is not None:
                residual_numbers = _measured(residual, other)
        z, mask = bn_act(
            y, numbers.scale, numbers.shift, residual=residual,
            residual_scale=residual_numbers.scale if residual_numbers else None,
            residual_shift=residual_numbers.shift if residual_numbers else None,
            act=spec.act, bit_mask=spec.call.differentiated and not spec.act.is_identity,
        )  # fmt: skip
        if not spec.call.differentiated:
            return Passed(z)
        raw_residual = residual if residual_numbers is not None else None
        affine = (*main.affine.tensors, *other.affine.tensors)
        return Passed(z, pack(Kept(y, numbers, raw_residual, residual_numbers, mask, affine)))

    @staticmethod
    def go_back(dz: Tensor, sums: None, spec: BNAddActSpec, pack: Packed, given: Given) -> Gradients:
        saved: Kept = unpack(pack)
        main, other = spec.norms(saved.affine)
        g = OutputGrad(dz, saved.mask, act=spec.act)
        dresidual: Tensor | None = None
        residual_grads: list[Tensor | None] = [None] * NORM_TENSORS
        if saved.residual is None or saved.residual_numbers is None:
            dy, grads = _through(g, saved.y, saved.numbers, main)
        elif spec.are_together:
            both = (saved.y, saved.numbers), (saved.residual, saved.residual_numbers)
            (dy, grads), (dresidual, residual_grads) = _through_together(g, both)
        else:
            dy, grads = _through(g, saved.y, saved.numbers, main)
            dresidual, residual_grads = _through(g, saved.residual, saved.residual_numbers, other)
        if dresidual is None and given.needed_residual:
            dresidual = masked_gradient(g).to(given.residual_dtype)
        named = zip([*grads, *residual_grads], given.tensors, strict=True)
        return Gradients(dy, [grad if wanted else None for grad, wanted in named], dresidual)

    @staticmethod
    def composed(ctx: Any, dz: Tensor) -> Composed:
        saved: Kept
        saved, (of_y, of_residual, joined) = kept_with_anchors(ctx)
        spec: BNAddActSpec = ctx.spec

        def form(y: Tensor, residual: Tensor | None, _: None, *tensors: Tensor | None) -> Tensor:
            main, other = spec.norms(tensors)
            z = normalised(y, main, saved.numbers)
            if residual is None:
                return z
            return z + (residual if spec.residual_norm is None else normalised(residual, other, saved.residual_numbers))

        raw = saved.residual
        residual = joining(dz, ctx.given.residual_dtype, joined) if raw is None else attached(raw, of_residual)
        return Composed((attached(saved.y, of_y), residual, None, *saved.affine), form, saved.mask, spec.act)


@dataclass(frozen=True)
class BNPReLUSpec(Holding):
    """``partials`` are y's where they were measured."""

    call: Call
    norm: NormNumbers
    partials: Partials | None = field(default=None, compare=False, repr=False, metadata=HELD)


class KeptOfPReLU(NamedTuple):
    y: Tensor
    numbers: Normaliser
    slope: Tensor
    affine: tuple[Tensor | None, ...]


class BNPReLU(FusedFunction):
    """z = prelu(bn(y)).

    ``apply(y, None, spec, slope, *tensors)``: y (N, K, P, Q); slope (K,) or (1,); tensors are those of a `Norm`.
    """

    op = "bn_prelu"

    @staticmethod
    def norms(spec: BNPReLUSpec) -> Norms:
        return [(1, spec.norm)]

    @staticmethod
    def run(y: Tensor, residual: None, spec: BNPReLUSpec, tensors: tuple[Any, ...], under: None) -> Passed:
        slope, norm = tensors[0], Norm.of(tensors[1:], spec.norm)
        y = channels_last(y)
        numbers = _measured(y, norm, spec.partials)
        z = bn_prelu(y, numbers.scale, numbers.shift, slope)
        kept = KeptOfPReLU(y, numbers, slope, norm.affine.tensors)
        return Passed(z, pack(kept) if spec.call.differentiated else None)

    @staticmethod
    def go_back(dz: Tensor, sums: None, spec: BNPReLUSpec, pack: Packed, given: Given) -> Gradients:
        saved: KeptOfPReLU = unpack(pack)
        dy, dgamma, dbeta, dslope = bn_prelu_backward(
            in_dtype(dz, saved.y.dtype), saved.y, saved.numbers, saved.slope, saved.affine[0],
            batch_stats=spec.norm.batch_stats,
        )  # fmt: skip
        named = zip((dslope, dgamma, dbeta, *[None] * (NORM_TENSORS - 2)), given.tensors, strict=True)
        return Gradients(dy, [grad if wanted else None for grad, wanted in named])

    @staticmethod
    def composed(ctx: Any, dz: Tensor) -> Composed:
        saved: KeptOfPReLU
        saved, (of_y,) = kept_with_anchors(ctx)

        def form(y: Tensor, residual: None, _: None, slope: Tensor, *tensors: Tensor | None) -> Tensor:
            v = normalised(y, Norm.of(tensors, ctx.spec.norm), saved.numbers)
            return prelu(v, slope.to(v.dtype))

        return Composed((attached(saved.y, of_y), None, None, saved.slope, *saved.affine), form)


known(AddActSpec, BNAddActSpec, BNPReLUSpec)


def _measured(y: Tensor, norm: Norm, partials: Partials | None = None) -> Normaliser:
    if not norm.numbers.batch_stats:
        partials = None
    elif partials is None:
        partials = bn_statistics(y)
    return normaliser_of(partials, norm, y.dtype)


def _through(g: OutputGrad, y: Tensor, numbers: Normaliser, norm: Norm) -> tuple[Tensor, list[Tensor | None]]:
    """The gradients of what a batch norm normalised and of its tensors."""
    typed = g._replace(g=in_dtype(g.g, y.dtype))
    dy, dgamma, dbeta = bn_backward(typed, y, numbers, norm.gamma, batch_stats=norm.numbers.batch_stats)
    return dy, [dgamma, dbeta, *[None] * (NORM_TENSORS - 2)]


def _through_together(
    g: OutputGrad, both: tuple[tuple[Tensor, Normaliser], tuple[Tensor, Normaliser]]
) -> list[tuple[Tensor, list[Tensor | None]]]:
    """The same of two batch norms that share the statistics of one group, by one collective."""
    typed = [g._replace(g=in_dtype(g.g, y.dtype)) for y, _ in both]
    own = [
        bn_backward_reduce(grad, y, numbers._replace(shared=None))
        for grad, (y, numbers) in zip(typed, both, strict=True)
    ]  # fmt: skip
    found: list[tuple[Tensor, list[Tensor | None]]] = []
    for grad, sums, (y, numbers) in zip(typed, of_group(own, [numbers for _, numbers in both]), both, strict=True):
        dy = bn_backward_apply(output_grad(grad, sums, y, numbers))
        found.append((dy, [sums.sum_gy, sums.sum_g, *[None] * (NORM_TENSORS - 2)]))
    return found
