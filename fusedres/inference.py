"""Inference: every convolution with its batch norm, shortcut and ReLU is one call, and nothing is kept from it.

Kernels form scale and shift from the parameters and running statistics as they are stored at that moment. Whoever
serves a model that does not change has its batch norms folded once by `fusedres.freeze`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from .launch import wants_kernels
from .ops.contract import ConvInput, Geometry, PoolGeometry, RunningNorm, channels_last, statistics_dtype
from .ops.conv_bn_act import Contraction, conv_bn_act
from .ops.conv_forward import conv_forward
from .ops.stem_pool import stem_pool
from .ops.zero_pad_shortcut import ZeroPadded
from .replay import replayed
from .rounded import rounded

if TYPE_CHECKING:
    from .chain import Layer


class Evaluated(NamedTuple):
    """A layer in evaluation: its weight in the dtype of the contraction, and its batch norm as it is stored.

    Without a batch norm, ``shift`` is the convolution's bias, if it has one.
    """

    weight: Tensor
    geometry: Geometry
    shift: Tensor | None = None
    norm: RunningNorm | None = None

    def of(self, u: ConvInput) -> Contraction:
        """As the operand of an op that consumes ``u``."""
        return Contraction(u, self.weight, self.geometry, shift=self.shift, running=self.norm)


def evaluated(layers: Sequence[Layer], dtype: torch.dtype) -> tuple[Evaluated, ...]:
    """Layers in evaluation, their weights rounded together where autocast asks for it."""
    weights = rounded([layer.tensors.weight for layer in layers], dtype)
    return tuple(_evaluated(layer, weight) for layer, weight in zip(layers, weights, strict=True))


def _evaluated(layer: Layer, weight: Tensor) -> Evaluated:
    _, bias, gamma, beta, running_mean, running_var, _ = layer.gained
    if running_mean is None or running_var is None:
        return Evaluated(weight, layer.geometry, None if bias is None else bias.to(statistics_dtype(weight.dtype)))
    return Evaluated(
        weight, layer.geometry, norm=RunningNorm(running_mean, running_var, gamma, beta, bias, layer.norm.eps)
    )


def infer_chain(
    x: Tensor,
    dtype: torch.dtype,
    layers: Sequence[Layer],
    projection: Layer | None,
    shortcut: str,
    residual: Tensor | None,
    zero_pad_stride: tuple[int, int],
    act: str | None,
) -> Tensor:
    """A chain from running statistics; the arguments of `run_chain` and the dtype of the contractions."""
    *main, last = evaluated(layers if projection is None else [*layers, projection], dtype)
    main, second = ([*main, last], None) if projection is None else (main, last)
    operands = (x, dtype, tuple(main), second, shortcut, residual, zero_pad_stride, act)
    return replayed(_chain, *operands) if wants_kernels(x) else _chain(*operands)


def _chain(
    x: Tensor, dtype: torch.dtype, layers: tuple[Evaluated, ...], projection: Evaluated | None, shortcut: str,
    residual: Tensor | None, zero_pad_stride: tuple[int, int], act: str | None,
) -> Tensor:  # fmt: skip
    x = channels_last(x)
    source = u = ConvInput(x.to(dtype))
    *inner, last = layers
    for layer in inner:
        u = ConvInput(conv_bn_act(layer.of(u), act="relu")[0])
    joining: Tensor | ZeroPadded | None = residual
    if shortcut == "identity":
        joining = x
    elif shortcut == "zero_pad":
        joining = ZeroPadded(x, last.weight.shape[0], zero_pad_stride)
    second = None if projection is None else projection.of(source)
    return conv_bn_act(last.of(u), residual=joining, second=second, act=act)[0]


def infer_stem(x: Tensor, layer: Layer, pool: PoolGeometry, dtype: torch.dtype) -> Tensor:
    """maxpool(relu(bn(conv(x)))) from running statistics; ``dtype``: of the contraction."""
    (x,) = rounded([x], dtype)
    (stem,) = evaluated([layer], dtype)
    if wants_kernels(x) and stem.norm is not None:
        return replayed(_stem_of_kernels, x, stem, pool)
    # The ReLU is monotonic, so it may follow the maximum, over a fraction of the pixels.
    return max_pool2d(conv_bn_act(stem.of(ConvInput(channels_last(x))), act=None)[0], *pool).relu_()


def _stem_of_kernels(x: Tensor, stem: Evaluated, pool: PoolGeometry) -> Tensor:
    y, _ = conv_forward(ConvInput(channels_last(x)), stem.weight, stem.geometry)
    return stem_pool(y, None, None, pool, indices=False, running=stem.norm)[0]
