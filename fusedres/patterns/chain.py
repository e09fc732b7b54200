"""Chains conv-BN-act-...-conv-BN with a shortcut: which rung of the ladder they run on, in training and inference."""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedres.activation import IDENTITY, RELU, Activation
from fusedres.autograd import ConvChain
from fusedres.autograd.shortcut import NO_SHORTCUT, Projection, Residual, Shortcut
from fusedres.autograd.spec import ChainSpec, LayerSpec
from fusedres.operands import ConvInput, Geometry, Layer, Norm
from fusedres.ops.bn_act import check_act
from fusedres.ops.checks import check_activation
from fusedres.ops.contractions import touched
from fusedres.ops.conv_bn_act import conv_bn_act
from fusedres.ops.rows import channels_last
from fusedres.patterns import inference
from fusedres.patterns.choose import AUTO, Choice, announce, chain_schedule, choose, use_moments
from fusedres.patterns.cost import ChainShape, LayerShape
from fusedres.patterns.door import Size, check_joins, checked_size, enter, with_rounded_weights
from fusedres.plan.gpus import Gpu
from fusedres.runtime.call import Call


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

    def check(self, call: Call) -> None:
        check_act(self.act)
        size = checked_size("x", self.x, self.layers[0], tuple(self.x.shape), call)
        for i, layer in enumerate(self.layers[1:], start=2):
            size = checked_size(f"layer {i}", self.x, layer, size, call)
        if self.residual is not None:
            self.shortcut = Residual(self.residual.resolve_neg())
            check_activation("residual", self.residual, device=self.x.device)
        check_shortcut(self.x, self.shortcut, size, call)

    def infer(self, call: Call) -> Tensor:
        layers, residual = inference.evaluated(self.every, call), self.residual
        count, shortcut = len(self.layers), self.shortcut.without_tensors()
        operands = (self.x, residual, layers[:count], layers[count:], shortcut, self.act, call.dtype)
        return inference.run(call, _inferred, *operands)

    def train(self, call: Call) -> Tensor:
        schedule = self.schedule
        if schedule == AUTO and call.gpu is not None:
            windows = tuple([(layer.weight.shape, layer.geometry) for layer in self.every])
            kind = self.shortcut.without_tensors()
            choice = _choice(self.x.shape, windows, len(self.layers), kind, call.dtype, call.gpu, call.tf32)
            announce(choice)
            schedule = choice.schedule.name
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
    act: Activation, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    x = channels_last(x)
    source = ConvInput(x.to(dtype))
    *inner, last = layers
    main = inference.contraction(inference.through(source, inner), last)
    second = inference.contraction(source, projection[0]) if projection else None
    joining = shortcut.operand(x, last.weight.shape[0]) if residual is None else residual
    return conv_bn_act(main, residual=joining, second=second, act=act)[0]


Window = tuple[Size, Geometry]  # shape of the weight, and how it moves


@functools.lru_cache(maxsize=4096)
def _choice(
    size: Size, windows: tuple[Window, ...], depth: int, shortcut: Shortcut, dtype: torch.dtype, gpu: Gpu, tf32: bool
) -> Choice:
    """The choice for a chain of ``depth`` layers; a projection's window comes behind theirs."""
    shapes, inner = [], size
    for window in windows[:depth]:
        shape, inner = conv_shape(inner, window)
        shapes.append(shape)
    if len(windows) > depth:
        shortcut = Projection(conv_shape(size, windows[depth])[0])
    return choose(ChainShape(tuple(shapes), shortcut), dtype, gpu, tf32=tf32)


def conv_shape(size: Size, window: Window) -> tuple[LayerShape, Size]:
    """What the choice depends on, and the (N, K, P, Q) of the output."""
    weight, geometry = window
    n, c, h, w = size
    k, _, *kernel = weight
    p, q = geometry.output_size(h, w, (kernel[0], kernel[1]))
    read = n
    for side, windows, taps, *step in zip((h, w), (p, q), kernel, *geometry[:3], strict=True):
        read *= touched(side, windows, taps, *step)
    padded, area = geometry.padding != (0, 0), (kernel[0], kernel[1])
    return LayerShape(read, n * math.prod((h, w)), n * p * q, c, k, geometry.groups, area, padded), (n, k, p, q)
