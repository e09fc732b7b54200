"""conv-BN-act chains with a shortcut: a single layer, a basic block, a bottleneck, as one autograd node each."""

from typing import Any, NamedTuple

from torch import Tensor

from fusedres.activation import IDENTITY
from fusedres.autograd import walk
from fusedres.autograd.composed import Composed, joining, layered, through
from fusedres.autograd.function import FusedFunction, Given, Gradients, Passed
from fusedres.autograd.graph import Norms
from fusedres.autograd.layer import (
    Below,
    Branch,
    LayerGrads,
    Needs,
    Summed,
    contraction,
    measure,
    measured_together,
    projection_grad,
    share_one_group,
    summed_together,
)
from fusedres.autograd.layouts import in_dtype
from fusedres.autograd.saved import Packed, attached, kept_with_anchors, pack, unpack
from fusedres.autograd.shortcut import Residual, Shortcut
from fusedres.autograd.spec import ChainSpec, layers_of, norms_of
from fusedres.operands import LAYER_TENSORS, ConvInput, Layer, OutputGrad, Producer
from fusedres.ops.act_mask import is_bits
from fusedres.ops.bn_act import bn_act
from fusedres.ops.bn_backward import NormSums, masked_gradient, of_group
from fusedres.ops.contractions import conv_input
from fusedres.ops.conv_bn_act import conv_bn_act
from fusedres.ops.conv_forward import conv_operand
from fusedres.ops.conv_input_grad import ProducerGrad
from fusedres.ops.rows import channels_last
from fusedres.ops.zero_pad_shortcut import Added, ZeroPadded


class Kept(NamedTuple):
    """All that the backward pass needs; no activation but raw outputs, the input and the mask.

    ``steps`` are those of the layers, ``parameters`` theirs and the projection's. ``under`` is the end of the block
    that made the input, whose gradient this one's last pass can reduce; its ``out`` is that input.
    """

    steps: tuple[walk.Step, ...]
    projection: Branch | None
    mask: Tensor | None
    parameters: tuple[Tensor | None, ...]
    under: Producer | None


class Joined(NamedTuple):
    """A block's output, its mask, and the branches that were summed."""

    z: Tensor
    mask: Tensor | None
    main: Branch
    projection: Branch | None


class ConvChain(FusedFunction):
    """z = act(bn(conv(... act(bn(conv(x))) ...)) + shortcut), with the backward pass of the whole chain.

    ``apply(x, residual, spec, *tensors)``: x (N, C, H, W); residual (N, K, P, Q) if the shortcut is a `Residual`, else
    None; tensors are the `Layer.tensors` of each layer, the projection's last.
    """

    op = "conv_chain"
    follows = True

    @staticmethod
    def norms(spec: ChainSpec) -> Norms:
        return norms_of(spec.every)

    @staticmethod
    def summands(x: Tensor, residual: Tensor | None, spec: ChainSpec) -> tuple[Tensor | None, ...]:
        return (residual if spec.act.needs_input else None,)

    @staticmethod
    def run(
        x: Tensor, residual: Tensor | None, spec: ChainSpec, tensors: tuple[Tensor | None, ...], under: Producer | None
    ) -> Passed:
        given, every, count = x, layers_of(spec.every, tensors), len(spec.layers)
        # Where no shortcut reads x beside the first convolution, and no moments are taken of it.
        packs = spec.call.kernels and type(spec.shortcut) in (Shortcut, Residual) and not every[0].moments
        x = x if packs else channels_last(x)
        source = conv_input(x, spec.dtype, every[0], pack=packs)
        last, projection = every[count - 1], every[count] if len(every) > count else None
        first = beside = None
        if projection is not None and share_one_group(every[0].norm.numbers, projection.norm.numbers):
            first, beside = measured_together(source, (every[0], projection), spec.schedule)
        u, steps = walk.forward(source, every[: count - 1], spec.schedule, first)
        shortcut = spec.shortcut.operand(x, last.weight.shape[0])
        if residual is not None:
            shortcut = channels_last(residual)
        measured = first if count == 1 else None, beside
        z, mask, main, beside = _ended(u, source, last, projection, shortcut, spec, measured)
        if not spec.call.differentiated:
            return Passed(z)
        if mask is None and not spec.act.is_identity:
            mask = z
        if not (spec.schedule.statistics and source.tensor is given):
            under = None
        parameters = tuple(tensor for layer in every for tensor in layer.parameters)
        saved = pack(Kept((*steps, walk.Step(main)), beside, mask, parameters, under))
        # Whoever makes the sums there makes this process's: they are shared when they are used, on every rank then.
        own = None if main.norm is None else main.norm._replace(shared=None)
        end = Producer(main.raw, own, mask=mask, act=spec.act) if own and _reducible(main, z, mask, spec) else None
        return Passed(z, saved, end=end)

    @staticmethod
    def go_back(dz: Tensor, sums: NormSums | None, spec: ChainSpec, pack: Packed, given: Given) -> Gradients:
        """From the gradient at z, and its sums where the block behind made them."""
        saved: Kept = unpack(pack)
        every, count = layers_of(spec.every, saved.parameters), len(spec.layers)
        arriving = OutputGrad(dz, saved.mask if sums is None else None, act=spec.act)
        if saved.mask is not None and not spec.schedule.bit_masks:
            arriving = OutputGrad(masked_gradient(arriving), scratch=True)
        g = arriving._replace(g=in_dtype(arriving.g, spec.dtype), scratch=False)

        # What reaches the block's input by the shortcut; the chain's first layer adds its own share to it.
        needs = walk.needs_of_layers(given.tensors[: LAYER_TENSORS * count], given.needed_x)
        at_input: Added | None = None
        beside: tuple[LayerGrads, ...] = ()
        main = saved.steps[count - 1].branch
        at_projection: Summed | None = None
        at_main: Summed | None = None
        if saved.projection is not None:
            wanted = Needs.of(given.tensors[-LAYER_TENSORS:], given.needed_x)
            of_projection = LayerGrads()
            one_group = share_one_group(every[-1].norm.numbers, every[count - 1].norm.numbers)
            if one_group and wanted.any and needs[-1].any:
                ends, branches = (every[-1], every[count - 1]), (saved.projection, main)
                at_projection, at_main = summed_together(g, branches, ends, sums)
                sums = None if sums is None else at_main.sums
            if wanted.any:
                of_projection, at_input = projection_grad(
                    g, saved.projection, every[-1], spec.schedule, wanted, given.size, at_projection
                )
            beside = (of_projection,)
        elif given.needed_x:
            at_input = spec.shortcut.input_grad(arriving, given.size)

        first = Below(at_input, _under(saved)) if given.needed_x else Below()
        if sums is not None and at_main is None:
            (sums,) = of_group([sums], [main.numbers])
        reached = g if sums is None else ProducerGrad(g.g, sums)
        grads, du = walk.backward(reached, saved.steps, every[:count], spec.schedule, needs, first, at_main)
        dx = reduced = None
        if given.needed_x and du is not None:
            dx, reduced = (du.g, du.sums) if isinstance(du, ProducerGrad) else (du, None)
            dx = dx.to(given.dtype)
        dresidual = masked_gradient(arriving).to(given.residual_dtype) if given.needed_residual else None
        return Gradients(dx, [grad for layer in (*grads, *beside) for grad in layer], dresidual, reduced)

    @staticmethod
    def composed(ctx: Any, dz: Tensor) -> Composed:
        saved: Kept
        saved, (anchor, of_residual) = kept_with_anchors(ctx)
        spec: ChainSpec = ctx.spec
        numbers = [step.branch.norm for step in saved.steps]

        def form(x: Tensor, residual: Tensor | None, _: None, *tensors: Tensor | None) -> Tensor:
            every, count = layers_of(spec.every, tensors), len(spec.layers)
            source = x.to(spec.dtype)
            z = layered(through(source, every[: count - 1], numbers), every[count - 1], numbers[-1])
            if saved.projection is not None:
                return z + layered(source, every[count], saved.projection.norm)
            return spec.shortcut.sum_with(z, x) if residual is None else z + residual

        x = attached(conv_operand(saved.steps[0].branch.source), anchor)
        inputs = (x, joining(dz, ctx.given.residual_dtype, of_residual), None, *saved.parameters)
        return Composed(inputs, form, saved.mask, spec.act)


def _ended(
    u: ConvInput, source: ConvInput, last: Layer, projection: Layer | None, shortcut: Tensor | ZeroPadded | None,
    spec: ChainSpec, measured: tuple[Branch | None, Branch | None],
) -> Joined:  # fmt: skip
    """The last layer and the sum; ``measured`` are that layer and the projection, if they are."""
    act, schedule = spec.act, spec.schedule
    # An activation whose slope neither bits nor its output tell has to leave its input, on whatever schedule.
    bit_mask = spec.call.differentiated and not act.is_identity and (schedule.bit_masks or act.needs_input)
    ends = (last,) if projection is None else (last, projection)
    if all(walk.is_normalised_by_one_op(end, schedule) for end in ends):
        beside = None
        if projection is not None:
            shortcut, _, beside = walk.normalised_by_one_op(source, projection, act=IDENTITY)
        z, mask, main = walk.normalised_by_one_op(u, last, residual=shortcut, act=act, bit_mask=bit_mask)
        return Joined(z, mask, main, beside)
    first, beside = measured
    if projection is not None and beside is None:
        beside = measure(source, projection, schedule)
    main = measure(u, last, schedule) if first is None else first
    z, mask = _summed(main, beside, last, projection, shortcut, {"act": act, "bit_mask": bit_mask})
    return Joined(z, mask, main, beside)


def _summed(
    main: Branch, beside: Branch | None, last: Layer, projection: Layer | None,
    residual: Tensor | ZeroPadded | None, end: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The block's end, in whichever single pass the branches' forms allow."""
    shortcut: dict[str, Any] = {"residual": residual}
    second = None
    if beside is not None and projection is not None:
        if beside.y is None:
            second = contraction(beside, projection)
        else:
            shortcut = _as_residual(beside)
    if main.y is None:
        first = contraction(main, last)
        return conv_bn_act(first, **({"second": second} if second else shortcut), **end)[:2]
    if second is None:
        return bn_act(main.y, main.numbers.scale, main.numbers.shift, **shortcut, **end)
    return conv_bn_act(second, **_as_residual(main), **end)[:2]


def _as_residual(branch: Branch) -> dict[str, Any]:
    """A written branch as what joins another."""
    numbers = branch.numbers
    return {"residual": branch.y, "residual_scale": numbers.scale, "residual_shift": numbers.shift}


def _reducible(main: Branch, z: Tensor, mask: Tensor | None, spec: ChainSpec) -> bool:
    """Whether the gradient at a chain's end has sums that the last pass of the block behind it makes."""
    written = main.y is not None and main.y.dtype == z.dtype
    measured = spec.schedule.statistics and spec.layers[-1].norm.batch_stats
    return spec.hands_over and written and is_bits(mask) and measured


def _under(saved: Kept) -> Producer | None:
    """The end of the block below, with this chain's input as its output."""
    return None if saved.under is None else saved.under._replace(out=saved.steps[0].branch.source.tensor)
