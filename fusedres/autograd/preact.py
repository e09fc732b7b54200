"""The pre-activation block as one autograd node: relu(bn(.)) is formed by whoever consumes it, before and after.

What is saved are raw tensors: x, y1, y2, ... and per-channel numbers. Passes over a bottleneck of width w (x and z
have 4w channels), in units of one w-channel tensor, on the rungs with a prologue. Forward: conv1 reads 4 and writes 1,
conv2 1 + 1, conv3 with the sum reads 1 + 4 and writes 4; z is measured as it is written, so that no pass reads it for
the next block's batch norm: 16, where eager has 50. Backward: each convolution's weight gradient and input gradient
read the arriving gradient and what they consumed, the latter masks and sums for the batch norm below; what remains at
x is dx = p * g + q * (x - mean) + r + dz, one pass (reads 12, writes 4).
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from fusedres.activation import IDENTITY, RELU, Activation
from fusedres.autograd import walk
from fusedres.autograd.composed import Composed, convolved, normalised, through
from fusedres.autograd.function import FusedFunction, Given, Gradients, Passed
from fusedres.autograd.graph import Norms
from fusedres.autograd.layer import Below, Branch, LayerGrads, Needs, normaliser_of, projection_grad
from fusedres.autograd.saved import Packed, attached, kept_with_anchors, pack, unpack
from fusedres.autograd.spec import LayeredSpec, layers_of, norms_of
from fusedres.operands import (
    LAYER_TENSORS,
    NORM_TENSORS,
    ConvInput,
    Layer,
    Norm,
    Normaliser,
    NormNumbers,
    OutputGrad,
    Partials,
    Producer,
)
from fusedres.ops.add_act import add_act
from fusedres.ops.bn_act import bn_act
from fusedres.ops.bn_backward import added_gradient, bn_backward, bn_backward_apply, output_grad
from fusedres.ops.bn_forward import bn_forward
from fusedres.ops.bn_statistics import bn_statistics
from fusedres.ops.conv_bn_act import Contraction, conv_bn_act
from fusedres.ops.conv_forward import conv_forward
from fusedres.ops.conv_input_grad import ProducerGrad, at_producer, with_added
from fusedres.ops.rows import channels_last
from fusedres.ops.zero_pad_shortcut import Added, shortcut_tensor
from fusedres.runtime.holding import HELD
from fusedres.runtime.text import known


@dataclass(frozen=True)
class PreActSpec(LayeredSpec):
    """[bn-act] conv-bn-act-...-conv and what joins it; a projection takes what the first convolution consumes.

    Attributes:
        norm: of the batch norm before the first convolution; None where x is activated already.
        act: between them.
        measured: whether the output is to be measured.
        partials: the statistics of x, where its producer measured it.
    """

    norm: NormNumbers | None = None
    act: Activation = RELU
    measured: bool = False
    partials: Partials | None = field(default=None, compare=False, repr=False, metadata=HELD)

    def head(self, tensors: tuple[Tensor | None, ...]) -> Norm | None:
        """The batch norm of x."""
        return None if self.norm is None else Norm.of(tensors[:NORM_TENSORS], self.norm)


known(PreActSpec)


class Kept(NamedTuple):
    """``source`` is what the first convolution consumed; ``affine`` gamma and beta of the batch norm of x."""

    x: Tensor | None
    numbers: Normaliser | None
    affine: tuple[Tensor | None, ...]
    source: ConvInput
    steps: tuple[walk.Step, ...]
    parameters: tuple[Tensor | None, ...]


class PreAct(FusedFunction):
    """z = conv(act(bn(... conv(act(bn(x)))))) + shortcut, and the statistics of z where they are asked for.

    ``apply(x, None, spec, *tensors)``: x (N, C, H, W); tensors are those of the first batch norm, then of each layer,
    the projection's last. Returns (z, counts, mean, m2), the latter the `Partials` of z, each None if it was not
    measured.
    """

    op = "preact"
    measured = True

    @staticmethod
    def norms(spec: PreActSpec) -> Norms:
        return [*([] if spec.norm is None else [(0, spec.norm)]), *norms_of(spec.every, NORM_TENSORS)]

    @staticmethod
    def run(x: Tensor, residual: None, spec: PreActSpec, tensors: tuple[Tensor | None, ...], under: None) -> Passed:
        head, every = spec.head(tensors), layers_of(spec.every, tensors[NORM_TENSORS:])
        x = channels_last(x)
        source, numbers = (ConvInput(x.to(spec.dtype)), None) if head is None else _activated(x, head, spec)
        count = len(spec.layers)
        u, steps = walk.forward(source, every[: count - 1], spec.schedule)
        z, partials = _ended(x, source, u, every, spec)
        if not spec.call.differentiated:
            return Passed(z, None, partials)
        saved = Kept(
            None if head is None else x,
            numbers,
            (head or Norm()).affine.tensors,
            source,
            (*steps, walk.Step(Branch(u))),
            tuple(tensor for layer in every for tensor in layer.parameters),
        )
        return Passed(z, pack(saved), partials)

    @staticmethod
    def go_back(dz: Tensor, sums: None, spec: PreActSpec, pack: Packed, given: Given) -> Gradients:
        """The gradients of x, of the first batch norm's tensors and of every convolution's."""
        saved: Kept = unpack(pack)
        every, count = layers_of(spec.every, saved.parameters), len(spec.layers)
        asked_of_head, asked = given.tensors[:NORM_TENSORS], given.tensors[NORM_TENSORS:]
        at_source = given.needed_x or any(asked_of_head[:2])
        needs = walk.needs_of_layers(asked[: LAYER_TENSORS * count], at_source)
        dz = channels_last(dz)
        g = OutputGrad(dz.to(spec.dtype))
        beside: tuple[LayerGrads, ...] = ()
        at_input: Added | None = None
        if spec.projection is not None:
            wanted = Needs.of(asked[-LAYER_TENSORS:], at_source)
            of_projection, at_input = projection_grad(
                g, Branch(saved.source), every[-1], spec.schedule, wanted, given.size
            )
            beside = (of_projection,)
        elif given.needed_x:
            at_input = spec.shortcut.input_grad(OutputGrad(dz), given.size)

        # A projection took what the first convolution consumed, the other shortcuts took x.
        with_first = at_source and (spec.norm is None or spec.projection is not None)
        first = Below(at_input if with_first else None, _under(saved, spec) if at_source else None)
        grads, du = walk.backward(g, saved.steps, every[:count], spec.schedule, needs, first)
        head: list[Tensor | None] = [None] * NORM_TENSORS
        dx = du if isinstance(du, Tensor) else None
        if spec.norm is not None and du is not None:
            shortcut = at_input if given.needed_x and spec.projection is None else None
            dx, *affine = _at_x(du, saved, spec, shortcut)
            for i, (grad, parameter) in enumerate(zip(affine, saved.affine, strict=False)):
                head[i] = grad.to(parameter.dtype) if asked_of_head[i] and parameter is not None else None
        elif du is None and given.needed_x and at_input is not None:
            dx = added_gradient(at_input)
        out = dx.to(given.dtype) if given.needed_x and dx is not None else None
        return Gradients(out, [*head, *(grad for layer in (*grads, *beside) for grad in layer)])

    @staticmethod
    def composed(ctx: Any, dz: Tensor) -> Composed:
        saved: Kept
        saved, (anchor,) = kept_with_anchors(ctx)
        spec: PreActSpec = ctx.spec
        numbers = [step.branch.norm for step in saved.steps[:-1]]

        def form(x: Tensor, residual: None, _: None, *tensors: Tensor | None) -> Tensor:
            head, every = spec.head(tensors), layers_of(spec.every, tensors[NORM_TENSORS:])
            source = x if head is None else spec.act.value(normalised(x, head, saved.numbers)).to(x.dtype)
            source = source.to(spec.dtype)
            z = convolved(through(source, every, numbers), every[len(numbers)])
            if spec.projection is not None:
                return z + convolved(source, every[-1])
            return spec.shortcut.sum_with(z, x)

        x = attached(saved.source.tensor if saved.x is None else saved.x, anchor)
        return Composed((x, None, None, *saved.affine, *saved.parameters), form)


def _activated(x: Tensor, norm: Norm, spec: PreActSpec) -> tuple[ConvInput, Normaliser]:
    """act(bn(x)), formed on load where prologues are."""
    partials = spec.partials
    if norm.numbers.batch_stats and partials is None:
        if not spec.schedule.statistics:
            out, _, numbers = bn_forward(x, norm, act=spec.act)
            return ConvInput(out.to(spec.dtype)), numbers
        partials = bn_statistics(x)
    numbers = normaliser_of(partials if norm.numbers.batch_stats else None, norm, x.dtype)
    if spec.schedule.prologue and x.dtype == spec.dtype:
        return ConvInput(x, numbers.scale, numbers.shift, spec.act), numbers
    return ConvInput(bn_act(x, numbers.scale, numbers.shift, act=spec.act)[0].to(spec.dtype)), numbers


def _ended(
    x: Tensor, source: ConvInput, u: ConvInput, every: tuple[Layer, ...], spec: PreActSpec
) -> tuple[Tensor, Partials | None]:
    """The last convolution and the sum, in one pass where the schedule has epilogues."""
    count = len(spec.layers)
    last, projection = every[count - 1], every[count] if len(every) > count else None
    residual = spec.shortcut.operand(x, last.weight.shape[0])
    if spec.schedule.statistics:
        second = None if projection is None else _contraction(source, projection, spec)
        main = _contraction(u, last, spec)
        z, _, partials = conv_bn_act(main, residual=residual, second=second, act=IDENTITY, statistics=spec.measured)
        return z, partials
    z, _ = conv_forward(u, last.weight_in(spec.dtype), last.geometry)
    if projection is not None:
        residual, _ = conv_forward(source, projection.weight_in(spec.dtype), projection.geometry)
    joining = shortcut_tensor(residual)
    return z if joining is None else add_act(z, joining, act=IDENTITY)[0], None


def _contraction(u: ConvInput, layer: Layer, spec: PreActSpec) -> Contraction:
    return Contraction(u, layer.weight_in(spec.dtype), layer.geometry)


def _under(saved: Kept, spec: PreActSpec) -> Producer | None:
    """The batch norm and activation of x, if its gradient is to be summed by the first convolution's pass."""
    if saved.x is None or saved.numbers is None or saved.x.dtype != spec.dtype or not spec.schedule.statistics:
        return None
    return Producer(saved.x, saved.numbers, act=spec.act)


def _at_x(
    du: Tensor | ProducerGrad, saved: Kept, spec: PreActSpec, shortcut: Added | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dgamma and dbeta of the first batch norm, the shortcut's gradient joined."""
    assert saved.x is not None and saved.numbers is not None and spec.norm is not None
    x, numbers = saved.x, saved.numbers
    if isinstance(du, Tensor) and (spec.schedule.statistics or saved.source.scale is not None):
        du = at_producer(du.to(x.dtype), Producer(x, numbers, act=spec.act))
    if isinstance(du, ProducerGrad):
        dy = output_grad(OutputGrad(du.g), du.sums if spec.norm.batch_stats else None, x, numbers)
        return bn_backward_apply(dy, add=shortcut), du.sums.sum_gy, du.sums.sum_g
    mask = walk.activation_mask(x, numbers, saved.source.tensor, spec.act)
    g = OutputGrad(du.to(x.dtype), mask.to(x.dtype), scratch=True, act=spec.act)
    dx, dgamma, dbeta = bn_backward(g, x, numbers, saved.affine[0], batch_stats=spec.norm.batch_stats)
    return with_added(dx, shortcut), dgamma, dbeta
