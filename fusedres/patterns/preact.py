"""The pre-activation chains [BN-act] conv-BN-act-...-conv with a shortcut, in training and inference."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from fusedres.activation import IDENTITY, RELU, Activation
from fusedres.autograd import PreAct
from fusedres.autograd.preact import PreActSpec
from fusedres.autograd.shortcut import Identity, Projection, Shortcut
from fusedres.autograd.spec import LayerSpec
from fusedres.operands import ConvInput, Layer, Norm
from fusedres.ops.conv_bn_act import conv_bn_act
from fusedres.ops.rows import channels_last
from fusedres.patterns import eager, inference
from fusedres.patterns.chain import check_shortcut, shapes_of
from fusedres.patterns.choose import AUTO, chain_schedule
from fusedres.patterns.door import (
    Size,
    check_norm_of,
    checked_size,
    enter,
    leave_statistics,
    partials_of,
    with_rounded_weights,
)
from fusedres.patterns.graph import graphed
from fusedres.runtime.call import Call


def run_preact(
    x: Tensor,
    norm: Norm | None,
    layers: Sequence[Layer],
    *,
    shortcut: Shortcut = Identity(),  # noqa: B008
    act: Activation = RELU,
    schedule: str = AUTO,
    measured: bool = True,
) -> Tensor:
    """conv(act(bn(... conv(act(bn(x)))))) + shortcut, fused, differentiable.

    Args:
        x: (N, C, H, W), any memory format (channels_last is fastest).
        norm: of x; None where x is activated already.
        layers: the convolutions in order, each with the batch norm behind it; the last one's norm is not applied.
        shortcut: what joins; a `Projection` takes what the first convolution does.
        act: the activation between the batch norm of x and the first convolution.
        schedule: ``"auto"`` or a rung of the ladder.
        measured: whether a batch norm of the output may follow, for which it is measured as it is written.

    Returns:
        (N, K, P, Q), channels_last.

    Raises:
        ValueError, TypeError: naming the argument, before any running statistic or counter has changed.
    """
    return enter(_PreAct(x, norm, tuple(layers), shortcut, act, schedule, measured))


@dataclass
class _PreAct:
    """A call of `run_preact`."""

    x: Tensor
    norm: Norm | None
    layers: tuple[Layer, ...]
    shortcut: Shortcut
    act: Activation
    schedule: str
    measured: bool

    @property
    def every(self) -> tuple[Layer, ...]:
        """The layers, and the projection last."""
        return (*self.layers, self.shortcut.layer) if isinstance(self.shortcut, Projection) else self.layers

    @property
    def norms(self) -> Iterator[Norm]:
        if self.norm is not None:
            yield self.norm
        yield from (layer.norm for layer in self.every)

    @property
    def tensors(self) -> Iterator[Tensor | None]:
        yield from (self.norm or Norm()).tensors
        for layer in self.every:
            yield from layer.tensors

    @property
    def shape(self) -> Hashable:
        joins = self.shortcut.without_tensors()
        return self.norm is None, shapes_of(self.every), len(self.layers), joins, self.act, self.measured

    def plain(self, call: Call) -> Tensor:
        return eager.preact(self.x, self.norm, self.layers, self.shortcut, self.act, call.dtype)

    def check(self, call: Call) -> None:
        size: Size = tuple(self.x.shape)
        if self.norm is not None:
            check_norm_of(size, self.norm)
        for i, layer in enumerate(self.layers, start=1):
            size = checked_size("x" if i == 1 else f"layer {i}", self.x, layer, size, call)
        check_shortcut(self.x, self.shortcut, size, call)

    def infer(self, call: Call) -> Tensor:
        layers, count = inference.evaluated(self.every, call), len(self.layers)
        norm = None if self.norm is None else inference.uncounted(self.norm)
        operands = (self.x, norm, layers[:count], layers[count:], self.shortcut.without_tensors(), self.act, call)
        return inference.run(call, _inferred, *operands)

    def train(self, call: Call) -> Tensor:
        every = with_rounded_weights(self.every, call.dtype)
        specs, count = tuple([LayerSpec.of(layer) for layer in every]), len(self.layers)
        schedule = chain_schedule(self.schedule, kernels=call.kernels)
        measures = any(norm.numbers.batch_stats for norm in self.norms)
        spec = PreActSpec(
            call,
            schedule,
            specs[:count],
            Projection(specs[-1]) if len(specs) > count else self.shortcut.without_tensors(),
            None if self.norm is None else self.norm.numbers,
            self.act,
            self.measured and schedule.statistics and measures,
            partials_of(self.x, self.norm),
        )
        tensors = [tensor for layer in every for tensor in layer.tensors]
        return leave_statistics(*PreAct.apply(self.x, None, spec, *(self.norm or Norm()).tensors, *tensors))


def _inferred(
    x: Tensor, norm: Norm | None, layers: tuple[Layer, ...], projection: tuple[Layer, ...], shortcut: Shortcut,
    act: Activation, call: Call,
) -> Tensor:  # fmt: skip
    x = channels_last(x)
    source = ConvInput(x.to(call.dtype)) if norm is None else inference.normalised(x, norm, act, call)
    *inner, last = layers
    main = inference.contraction(inference.through(source, inner), last)
    second = inference.contraction(source, projection[0]) if projection else None
    residual = shortcut.operand(x, last.weight.shape[0])
    return conv_bn_act(main, residual=residual, second=second, act=IDENTITY)[0]


graphed(_PreAct, enter)
