"""Chains conv-BN-act-...-conv-BN with a shortcut: which rung of the ladder they run on, in training and inference."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedres.activation import IDENTITY, RELU, Activation
from fusedres.autograd import ConvChain
from fusedres.autograd.shortcut import NO_SHORTCUT, Projection, Residual, Shortcut
from fusedres.autograd.spec import ChainSpec, LayerSpec
from fusedres.operands import Layer, Norm
from fusedres.ops.bn_act import check_act
from fusedres.ops.checks import check_activation
from fusedres.ops.contractions import conv_input
from fusedres.ops.conv_bn_act import conv_bn_act
from fusedres.ops.rows import channels_last
from fusedres.patterns import eager, inference
from fusedres.patterns.choose import AUTO, chain_schedule, use_moments
from fusedres.patterns.door import Size, check_joins, checked_size, enter, one_sample, with_rounded_weights
from fusedres.patterns.graph import graphed
from fusedres.runtime.call import Call
from fusedres.runtime.graphs import signed


def run_chain(
    x: Tensor,
    layers: Sequence[Layer],
    *,
    shortcut: Shortcut = NO_SHORTCUT,
    act: Activation = RELU,
    schedule: str = AUTO,
    hands_over: bool = False,
) -> Tensor:
    """act(bn(conv(... act(bn(conv(x))) ...)) + shortcut), fused, differentiable.

    Args:
        x: (N, C, H, W), any memory format (channels_last is fastest).
        layers: the chain in order; an activation of the last is not applied.
        shortcut: what joins; a `Projection` of a `Layer`, a `Residual` of a tensor (N, K, P, Q).
        act: the activation of the sum.
        schedule: ``"auto"`` or a rung of the ladder.
        hands_over: whether the result goes to another fused chain and nobody else.

    Returns:
        (N, K, P, Q), channels_last.

    Raises:
        ValueError, TypeError: naming the argument, before any running statistic or counter has changed.
    """
    if isinstance(shortcut, Projection) and shortcut.pool is not None:
        shortcut = Residual(run_chain(shortcut.pool(x), [shortcut.layer], act=IDENTITY, schedule=schedule))
    return enter(_Chain(x, tuple(layers), shortcut, act, schedule, hands_over))


@dataclass
class _Chain:
    """A call of `run_chain`."""

    x: Tensor
    layers: tuple[Layer, ...]
    shortcut: Shortcut
    act: Activation
    schedule: str
    hands_over: bool

    @property
    def every(self) -> tuple[Layer, ...]:
        """The layers, and the projection last."""
        return (*self.layers, self.shortcut.layer) if isinstance(self.shortcut, Projection) else self.layers

    @property
    def residual(self) -> Tensor | None:
        return self.shortcut.tensor if isinstance(self.shortcut, Residual) else None

    @property
    def norms(self) -> Iterator[Norm]:
        return (layer.norm for layer in self.every)

    @property
    def tensors(self) -> Iterator[Tensor | None]:
        yield self.residual
        for layer in self.every:
            yield from layer.tensors

    @property
    def shape(self) -> Hashable:
        return shapes_of(self.every), len(self.layers), self.shortcut.without_tensors(), self.act, self.hands_over

    def plain(self, call: Call) -> Tensor:
        return eager.chain(self.x, self.layers, self.shortcut, self.act, call.dtype)

    def check(self, call: Call) -> None:
        check_act(self.act)
        size = checked_size("x", self.x, self.layers[0], tuple(self.x.shape), call)
        for i, layer in enumerate(self.layers[1:], start=2):
            size = checked_size(f"layer {i}", self.x, layer, size, call)
        if self.residual is not None:
            self.shortcut = Residual(signed(one_sample(self.residual) if call.absent else self.residual))
            check_activation("residual", self.residual, device=self.x.device)
        check_shortcut(self.x, self.shortcut, size, call)

    def infer(self, call: Call) -> Tensor:
        layers, residual = inference.evaluated(self.every, call), self.residual
        count, shortcut = len(self.layers), self.shortcut.without_tensors()
        operands = (self.x, residual, layers[:count], layers[count:], shortcut, self.act, call.dtype, call.kernels)
        return inference.run(call, _inferred, *operands)

    def train(self, call: Call) -> Tensor:
        schedule = self.schedule
        last = len(self.layers) - 1
        every = [
            layer._replace(moments=True) if i >= last and use_moments(schedule, layer, call) else layer
            for i, layer in enumerate(with_rounded_weights(self.every, call.dtype))
        ]
        specs = tuple([LayerSpec.of(layer) for layer in every])
        shortcut = Projection(specs[-1]) if len(specs) > last + 1 else self.shortcut.without_tensors()
        spec = ChainSpec(
            call, chain_schedule(schedule, kernels=call.kernels), specs[: last + 1], shortcut, self.act, self.hands_over
        )
        tensors = [tensor for layer in every for tensor in layer.tensors]
        z: Tensor = ConvChain.apply(self.x, self.residual, spec, *tensors)
        return z


def shapes_of(layers: Sequence[Layer]) -> Hashable:
    """Of each layer, what time depends on."""
    return tuple([(layer.weight.shape, layer.geometry, layer.norm.numbers.batch_stats, layer.act) for layer in layers])


def check_shortcut(x: Tensor, shortcut: Shortcut, size: Size, call: Call) -> None:
    """Refuse what does not join an output of ``size``."""
    if isinstance(shortcut, Projection):
        joins: Size | None = checked_size("projection", x, shortcut.layer, tuple(x.shape), call)
    else:
        joins = shortcut.operand_size(tuple(x.shape), size[1])
    if joins is not None:
        check_joins(shortcut.name, joins, size)


def _inferred(
    x: Tensor, residual: Tensor | None, layers: tuple[Layer, ...], projection: tuple[Layer, ...], shortcut: Shortcut,
    act: Activation, dtype: torch.dtype, kernels: bool,
) -> Tensor:  # fmt: skip
    packs = kernels and not projection and type(shortcut) in (Shortcut, Residual)
    x = x if packs else channels_last(x)
    source = conv_input(x, dtype, layers[0], pack=packs)
    *inner, last = layers
    main = inference.contraction(inference.through(source, inner), last)
    second = inference.contraction(source, projection[0]) if projection else None
    joining = shortcut.operand(x, last.weight.shape[0]) if residual is None else residual
    return conv_bn_act(main, residual=joining, second=second, act=act)[0]


graphed(_Chain, enter)
