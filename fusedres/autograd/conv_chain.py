"""conv-BN-ReLU chains with a shortcut: a single layer, a basic block, a bottleneck, as one autograd node each."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, carried
from ..autocast import no_autocast
from ..ops.bn_act import bn_act
from ..ops.bn_backward import NormSums, masked
from ..ops.bn_forward import bn_forward
from ..ops.contract import ConvInput, OutputGrad, Producer, channels_last
from ..ops.conv_bn_act import conv_bn_act
from ..ops.conv_forward import conv_forward, formed
from ..ops.conv_input_grad import ProducerGrad
from ..ops.relu_mask import is_bits
from ..ops.zero_pad_shortcut import Added, ZeroPadded, ZeroPaddedGrad
from ..plan import Schedule
from ..replay import replayed
from .composed import Composed, chain, joining
from .layer import (
    PARAMETERS,
    Below,
    Branch,
    LayerGrads,
    Needs,
    SourceGrad,
    branch_backward,
    contraction,
    grouped,
    is_idle,
    layer_backward,
    measure,
    needs_of,
    samples,
    shortcut_grad,
)
from .layouts import arrived, in_dtype
from .saved import Packed, attached, fused_or_composed, keep, kept, kept_with_anchors, packed, unpacked
from .spec import ChainSpec, ConvBN, LayerSpec


class Inner(NamedTuple):
    """A layer inside the chain: what `measure` left of it and, if it was written, its rectified output."""

    branch: Branch
    out: Tensor | None


class Kept(NamedTuple):
    """All that the backward pass needs; no activation but raw outputs, the input and the mask.

    ``under`` is the end of the block that made the input, whose gradient this one's last pass can reduce; its ``out``
    is that input.
    """

    inner: tuple[Inner, ...]
    main: Branch
    projection: Branch | None
    mask: Tensor | None
    parameters: tuple[ConvBN, ...]
    under: Producer | None


class Passed(NamedTuple):
    """What a forward pass gives: z; for a backward pass, if there is one, the `Kept`; and the end of the chain, where
    the block behind it can make the sums of the gradient that arrives there."""

    z: Tensor
    saved: Packed | None = None
    end: Producer | None = None


def _in_one_op(spec: LayerSpec, schedule: Schedule) -> bool:
    """Whether a layer's batch norm is measured and applied by one op over its written output."""
    return spec.norm.batch_stats and not (schedule.statistics or spec.moments)


def _normalise(
    u: ConvInput, layer: ConvBN, spec: LayerSpec, *, residual: Tensor | ZeroPadded | None = None,
    act: str | None = "relu", bit_mask: bool = False,
) -> tuple[Tensor, Tensor | None, Branch]:  # fmt: skip
    """act(bn(conv(u)) + residual) with its batch norm in one op, and the mask."""
    y, _ = conv_forward(u, spec.weight(layer, u.tensor.dtype), spec.geometry)
    z, mask, norm = bn_forward(
        y, layer.gamma, layer.beta, layer.running_mean, layer.running_var, bias=layer.bias,
        eps=spec.norm.eps, momentum=spec.norm.momentum, counted=layer.counted, residual=residual, act=act,
        bit_mask=bit_mask,
    )  # fmt: skip
    return z, mask, Branch(u, norm, y, None)


def _inner_forward(u: ConvInput, layer: ConvBN, spec: LayerSpec, schedule: Schedule) -> tuple[ConvInput, Inner]:
    if _in_one_op(spec, schedule):
        out, _, branch = _normalise(u, layer, spec)
        return ConvInput(out), Inner(branch, out)
    branch = measure(u, layer, spec, schedule)
    assert branch.y is not None
    if schedule.prologue:
        return ConvInput(branch.y, branch.norm.scale, branch.norm.shift), Inner(branch, None)
    out, _ = bn_act(branch.y, branch.norm.scale, branch.norm.shift)
    return ConvInput(out), Inner(branch, out)


def _join(
    main: Branch, projection: Branch | None, residual: Tensor | ZeroPadded | None,
    parameters: tuple[ConvBN, ...], spec: ChainSpec, bit_mask: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The block end, in whichever single pass the branches' forms allow."""
    numbers: tuple[Tensor | None, Tensor | None] = (None, None)
    if projection is not None and projection.y is not None:
        residual, numbers = projection.y, (projection.norm.scale, projection.norm.shift)
    end: dict[str, Any] = {"act": spec.act, "bit_mask": bit_mask}
    shortcut: dict[str, Any] = {
        "residual": residual,
        "residual_scale": numbers[0],
        "residual_shift": numbers[1],
    }
    last = len(spec.layers) - 1
    second = None
    if projection is not None and projection.y is None:
        assert spec.projection is not None
        second = contraction(projection, parameters[-1], spec.projection)
    if main.y is None:
        first = contraction(main, parameters[last], spec.layers[last])
        return conv_bn_act(first, **({"second": second} if second else shortcut), **end)[:2]
    if second is None:
        return bn_act(main.y, main.norm.scale, main.norm.shift, **shortcut, **end)
    swapped: dict[str, Any] = {
        "residual": main.y,
        "residual_scale": main.norm.scale,
        "residual_shift": main.norm.shift,
    }
    return conv_bn_act(second, **swapped, **end)[:2]


class ConvChain(torch.autograd.Function):
    """z = act(bn(conv(... relu(bn(conv(x))) ...)) + shortcut), with the backward pass of the whole chain.

    ``apply(x, residual, spec, *tensors)``: x (N, C, H, W); residual (N, K, P, Q) if ``spec.shortcut`` is
    ``"residual"``, else None; tensors are the fields of one `ConvBN` per layer, the projection's last.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, spec: ChainSpec, *tensors: Tensor | None) -> Tensor:
        under, needed_x, training = carried.ends.take(x), ctx.needs_input_grad[0], any(ctx.needs_input_grad)
        with no_autocast(x.device.type):
            z, saved, end = replayed(_forward, x, residual, spec, tensors, under if needed_x else None, training)
        if saved is not None:
            ctx.spec, ctx.backend = spec, backends.current()
            ctx.input_dtype, ctx.input_size = x.dtype, tuple(x.shape)
            ctx.residual_dtype = None if residual is None else residual.dtype
            keep(ctx, saved, x)
        if end is not None:
            carried.ends.leave(z, end)
        return z

    @staticmethod
    @fused_or_composed
    def backward(ctx: Any, dz: Tensor) -> tuple[Any, ...]:
        sums, saved = carried.reduced.take(dz), kept(ctx)
        dx, reduced, dresidual, grads = replayed(
            _backward, arrived(dz, ctx.owner), sums, ctx.spec, saved, ctx.needs_input_grad,
            ctx.input_dtype, ctx.input_size, ctx.residual_dtype,
        )  # fmt: skip
        if dx is not None and reduced is not None:
            carried.reduced.leave(dx, reduced)
        return (dx, dresidual, None, *grads)

    @staticmethod
    def composed(ctx: Any, dz: Tensor) -> Composed:
        saved: Kept
        saved, (anchor,) = kept_with_anchors(ctx)
        branches = [*(step.branch for step in saved.inner), saved.main]
        x = attached(branches[0].source.tensor, anchor)
        if saved.projection is not None:
            branches.append(saved.projection)

        def form(x: Tensor, residual: Tensor | None, _: None, *tensors: Tensor | None) -> Tensor:
            return chain(x, residual, ctx.spec, grouped(tensors), [branch.norm for branch in branches])

        tensors = (tensor for layer in saved.parameters for tensor in layer)
        return Composed((x, joining(dz, ctx.residual_dtype), None, *tensors), form, saved.mask)


def _forward(
    x: Tensor, residual: Tensor | None, spec: ChainSpec, tensors: tuple[Tensor | None, ...], under: Producer | None,
    training: bool,
) -> Passed:  # fmt: skip
    given, parameters = x, tuple(grouped(tensors))
    x = channels_last(x)
    shortcut: Tensor | ZeroPadded | None = None if residual is None else channels_last(residual)
    source = u = ConvInput(x.to(spec.dtype))
    inner = []
    for layer, layer_spec in zip(parameters, spec.layers[:-1], strict=False):
        u, step = _inner_forward(u, layer, layer_spec, spec.schedule)
        inner.append(step)
    last = len(spec.layers) - 1
    if spec.shortcut == "identity":
        shortcut = x
    elif spec.shortcut == "zero_pad":
        shortcut = ZeroPadded(x, parameters[last].weight.shape[0], spec.zero_pad_stride)
    rectified = training and spec.act == "relu"
    bit_mask = rectified and spec.schedule.bit_masks
    projection = None
    ends = spec.layers[last:] if spec.projection is None else (spec.layers[last], spec.projection)
    if all(_in_one_op(end, spec.schedule) for end in ends):
        if spec.projection is not None:
            shortcut, _, projection = _normalise(source, parameters[-1], spec.projection, act=None)
        z, mask, main = _normalise(
            u, parameters[last], spec.layers[last], residual=shortcut, act=spec.act, bit_mask=bit_mask
        )
    else:
        if spec.projection is not None:
            projection = measure(source, parameters[-1], spec.projection, spec.schedule)
        main = measure(u, parameters[last], spec.layers[last], spec.schedule)
        z, mask = _join(main, projection, shortcut, parameters, spec, bit_mask)
    if not training:
        return Passed(z)
    if rectified and mask is None:
        mask = z
    if not (spec.schedule.statistics and source.tensor is given):
        under = None
    learnt = tuple(layer.parameters for layer in parameters)
    saved = packed(Kept(tuple(inner), main, projection, mask, learnt, under))
    if not (spec.hands_over and rectified and _reducible(main, z, mask, spec)):
        return Passed(z, saved)
    assert main.y is not None
    return Passed(z, saved, Producer(main.y, main.norm, mask=mask))


def _reducible(main: Branch, z: Tensor, mask: Tensor | None, spec: ChainSpec) -> bool:
    """Whether the gradient at a chain's end has sums that the last pass of the block behind it can make."""
    written = main.y is not None and main.y.dtype == z.dtype
    return written and is_bits(mask) and spec.schedule.statistics and spec.layers[-1].norm.batch_stats


def _needs(asked_of: tuple[bool, ...], spec: ChainSpec) -> tuple[list[Needs], bool]:
    """Per layer (the projection last) what is asked for; a layer's source is needed if anything below it is."""
    needed_x, _, _, *flat = asked_of
    asked = [flat[i : i + PARAMETERS] for i in range(0, len(flat), PARAMETERS)]
    below, needs = needed_x, []
    for layer in asked[: len(spec.layers)]:
        needs.append(needs_of(layer, below))
        below = below or any(layer)
    if spec.projection is not None:
        needs.append(needs_of(asked[-1], needed_x))
    return needs, needed_x


class Gradients(NamedTuple):
    """What `ConvChain` gives back; ``reduced``: the sums of dx, where it is behind the ReLU of the block below."""

    dx: Tensor | None
    reduced: NormSums | None
    dresidual: Tensor | None
    tensors: tuple[Tensor | None, ...]


def _backward(
    dz: Tensor, sums: NormSums | None, spec: ChainSpec, pack: Packed, asked_of: tuple[bool, ...],
    input_dtype: torch.dtype, input_size: tuple[int, ...], residual_dtype: torch.dtype | None,
) -> Gradients:  # fmt: skip
    """From the gradient at z, and its sums where the block behind made them."""
    saved: Kept = unpacked(pack)
    arriving = OutputGrad(dz, saved.mask if sums is None else None)
    needs, needed_x = _needs(asked_of, spec)
    schedule, last = spec.schedule, len(spec.layers) - 1
    if saved.mask is not None and not schedule.bit_masks:
        arriving = OutputGrad(masked(arriving), scratch=True)
    g = arriving._replace(g=in_dtype(arriving.g, spec.dtype), scratch=False)
    grads: list[LayerGrads] = [LayerGrads()] * len(saved.parameters)

    # What reaches the block's input by the shortcut; the chain's first layer adds its own share to it.
    at_input: Added | None = None
    if saved.projection is not None and spec.projection is not None:
        if needs[-1].any:
            layer, projection = saved.parameters[-1], spec.projection
            below = Below(compact=samples(layer, projection))
            grads[-1], dx = branch_backward(g, saved.projection, layer, projection, schedule, needs[-1], below)
            at_input = shortcut_grad(dx, input_size, layer, projection)
    elif spec.shortcut == "identity":
        at_input = arriving
    elif spec.shortcut == "zero_pad" and needed_x:
        at_input = ZeroPaddedGrad(arriving, input_size, spec.zero_pad_stride)

    du: SourceGrad = None if sums is None else ProducerGrad(g.g, sums)
    branch, out = saved.main, None
    for i in range(last, -1, -1):
        layer, layer_spec = saved.parameters[i], spec.layers[i]
        if not needs[i].any:
            break
        below = Below(at_input, _under(saved)) if i == 0 and needed_x else Below()
        if i > 0 and needs[i].source and schedule.statistics and not is_idle(spec.layers[i - 1].norm, needs[i - 1]):
            under = saved.inner[i - 1].branch
            assert under.y is not None
            below = Below(producer=Producer(under.y, under.norm))
        if isinstance(du, ProducerGrad):
            grads[i], du = layer_backward(
                OutputGrad(du.g), du.sums, branch, layer, layer_spec, schedule, needs[i], below
            )
        else:
            reached = g if du is None else _behind_relu(du, out, branch)
            grads[i], du = branch_backward(reached, branch, layer, layer_spec, schedule, needs[i], below)
        if i > 0:
            branch, out = saved.inner[i - 1]

    dx = reduced = None
    if needed_x and isinstance(du, ProducerGrad):
        dx, reduced = du.g.to(input_dtype), du.sums
    elif needed_x and isinstance(du, Tensor):
        dx = du.to(input_dtype)
    dresidual = masked(arriving).to(residual_dtype) if asked_of[1] else None
    return Gradients(dx, reduced, dresidual, tuple(grad for layer_grads in grads for grad in layer_grads))


def _under(saved: Kept) -> Producer | None:
    """The end of the block below, with this chain's input as its output."""
    first = saved.inner[0].branch if saved.inner else saved.main
    return None if saved.under is None else saved.under._replace(out=first.source.tensor)


def _behind_relu(du: Tensor, out: Tensor | None, branch: Branch) -> OutputGrad:
    """The gradient at a layer's rectified output (``out``, where it was written), masked on load."""
    assert branch.y is not None
    mask = formed(ConvInput(branch.y, branch.norm.scale, branch.norm.shift)) if out is None else out
    return OutputGrad(du, mask, scratch=True)
