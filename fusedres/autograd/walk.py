"""Layers in a row: the way through them, and the way back from the last to the first."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fusedres.activation import IDENTITY, RELU, Activation
from fusedres.autograd.layer import (
    Below,
    Branch,
    LayerGrads,
    Needs,
    SourceGrad,
    Summed,
    branch_backward,
    is_idle,
    measure,
    reduced_backward,
)
from fusedres.operands import LAYER_TENSORS, ConvInput, Layer, Normaliser, OutputGrad
from fusedres.ops.bn_act import bn_act
from fusedres.ops.bn_forward import bn_forward
from fusedres.ops.conv_forward import conv_forward, conv_operand
from fusedres.ops.conv_input_grad import ProducerGrad
from fusedres.ops.zero_pad_shortcut import ZeroPadded
from fusedres.plan.schedule import Schedule


class Step(NamedTuple):
    """A layer as its forward pass left it: what was measured, and what it put out, if the next one found it written."""

    branch: Branch
    out: Tensor | None = None


def is_normalised_by_one_op(layer: Layer, schedule: Schedule) -> bool:
    """Whether a layer's batch norm is measured and applied by one op over its written output."""
    numbers = layer.norm.numbers
    return numbers.batch_stats and not (schedule.statistics or layer.moments or numbers.is_shared)


def normalised_by_one_op(
    u: ConvInput, layer: Layer, *, residual: Tensor | ZeroPadded | None = None, act: Activation = RELU,
    bit_mask: bool = False,
) -> tuple[Tensor, Tensor | None, Branch]:  # fmt: skip
    """act(bn(conv(u)) + residual) with its batch norm in one op, and the mask."""
    y, _ = conv_forward(u, layer.weight_in(u.tensor.dtype), layer.geometry)
    z, mask, norm = bn_forward(y, layer.norm, residual=residual, act=act, bit_mask=bit_mask)
    return z, mask, Branch(u, norm, y)


def forward(
    u: ConvInput, layers: Sequence[Layer], schedule: Schedule, first: Branch | None = None
) -> tuple[ConvInput, tuple[Step, ...]]:
    """act(bn(conv(u))) by every layer, as whoever comes behind them consumes it; ``first``: the first, if measured."""
    steps = []
    for layer in layers:
        u, step = _layer_forward(u, layer, schedule, first)
        steps.append(step)
        first = None
    return u, tuple(steps)


def _layer_forward(
    u: ConvInput, layer: Layer, schedule: Schedule, measured: Branch | None
) -> tuple[ConvInput, Step]:  # fmt: skip
    if is_normalised_by_one_op(layer, schedule):
        out, _, branch = normalised_by_one_op(u, layer, act=layer.act)
        return ConvInput(out), Step(branch, out)
    branch = measure(u, layer, schedule) if measured is None else measured
    scale, shift = branch.numbers.scale, branch.numbers.shift
    if schedule.prologue:
        return ConvInput(branch.raw, scale, shift, layer.act), Step(branch)
    out, _ = bn_act(branch.raw, scale, shift, act=layer.act)
    return ConvInput(out), Step(branch, out)


def needs_of_layers(asked: Sequence[bool], source: bool) -> list[Needs]:
    """What is asked of layers in a row.

    Args:
        asked: ``ctx.needs_input_grad`` of their tensors.
        source: whether the gradient of the first one's input is needed; of a later one's it is if anything below is
            asked for.
    """
    needs = []
    for i in range(0, len(asked), LAYER_TENSORS):
        of_layer = asked[i : i + LAYER_TENSORS]
        needs.append(Needs.of(of_layer, source))
        source = source or any(of_layer)
    return needs


def backward(
    arriving: OutputGrad | ProducerGrad, steps: Sequence[Step], layers: Sequence[Layer], schedule: Schedule,
    needs: Sequence[Needs], first: Below, summed: Summed | None = None,
) -> tuple[list[LayerGrads], SourceGrad]:  # fmt: skip
    """The gradients of the layers and of the first one's input.

    Args:
        arriving: at the last layer's batch norm; at its raw output where it has none.
        steps, layers, needs: of the layers, in their order.
        schedule: what is written to memory.
        first: what is under the first layer.
        summed: the sums of the last layer's batch norm, where they are known.
    """
    grads = [LayerGrads()] * len(layers)
    du: SourceGrad = None
    for i in range(len(layers) - 1, -1, -1):
        if not needs[i].any:
            return grads, None
        branch, layer = steps[i].branch, layers[i]
        if du is not None:
            arriving = du if isinstance(du, ProducerGrad) else _behind(du, steps[i], layer.act)
        below = first if i == 0 else _below(steps[i - 1], layers[i - 1], schedule, needs[i - 1])
        if isinstance(arriving, ProducerGrad):
            g = OutputGrad(arriving.g)
            grads[i], du = reduced_backward(g, arriving.sums, branch, layer, schedule, needs[i], below)
        else:
            grads[i], du = branch_backward(arriving, branch, layer, schedule, needs[i], below, summed)
        summed = None
    return grads, du


def _below(step: Step, layer: Layer, schedule: Schedule, needs: Needs) -> Below:
    """What is under the layer behind ``layer``: its batch norm, if a gradient is to be summed for it."""
    if not needs.any or not schedule.statistics or is_idle(layer.norm.numbers, needs):
        return Below()
    return Below(producer=step.branch.producer(layer.act))


def _behind(du: Tensor, step: Step, act: Activation) -> OutputGrad:
    """The gradient at what a layer put out, masked on load."""
    mask = activation_mask(step.branch.raw, step.branch.numbers, step.out, act)
    return OutputGrad(du, mask, scratch=True, act=act)


def activation_mask(y: Tensor, norm: Normaliser, out: Tensor | None, act: Activation) -> Tensor:
    """What tells the slope of the activation of a batch norm: its output, ``out`` where that was written, or its
    input."""
    if out is not None and not act.needs_input:
        return out
    return conv_operand(ConvInput(y, norm.scale, norm.shift, IDENTITY if act.needs_input else act))
