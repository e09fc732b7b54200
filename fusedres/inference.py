"""Inference: every convolution with its batch norm, shortcut and ReLU is one call, batch norm folded in once."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d
from torch.utils.weak import WeakIdKeyDictionary

from . import backends
from .autograd.layer import normaliser_of
from .launch import wants_kernels
from .ops import onednn
from .ops.contract import ConvInput, PoolGeometry, channels_last
from .ops.conv_bn_act import Contraction, conv_bn_act
from .ops.conv_forward import conv_forward
from .ops.stem_pool import stem_pool
from .ops.zero_pad_shortcut import ZeroPadded, written
from .writes import state_of

if TYPE_CHECKING:
    from .chain import Layer

T = TypeVar("T")

_folded: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""weight -> (fingerprint of its layer's tensors, what was made of them, by kind); an entry dies with its weight."""


def forget(weight: Tensor) -> None:
    """Drop what is cached for a layer; the next call folds and packs it again."""
    _folded.pop(weight, None)


def infer_layer(u: Tensor, layer: "Layer", act: str | None, residual: Tensor | ZeroPadded | None = None) -> Tensor:
    """act(bn(conv(u)) + residual) from running statistics; ``u`` in the dtype of the contraction."""
    u = channels_last(u)
    if backends.runs_native() and onednn.runs(u) and (residual is None or residual.dtype == u.dtype):
        packed = _packed_layer(u, layer)
        if packed is not None:
            return onednn.conv_act(u, packed, written(residual), act)
    return conv_bn_act(contraction_of(u, layer), residual=residual, act=act)[0]


def infer_chain(
    x: Tensor,
    dtype: torch.dtype,
    layers: Sequence["Layer"],
    projection: "Layer | None",
    shortcut: str,
    residual: Tensor | None,
    zero_pad_stride: tuple[int, int],
    act: str | None,
) -> Tensor:
    """A chain from running statistics; the arguments of `run_chain` and the dtype of the contractions."""
    x = channels_last(x)
    source = u = x.to(dtype)
    for layer in layers[:-1]:
        u = infer_layer(u, layer, "relu")
    joining: Tensor | ZeroPadded | None = residual
    if shortcut == "identity":
        joining = x
    elif shortcut == "zero_pad":
        joining = ZeroPadded(x, layers[-1].tensors.weight.shape[0], zero_pad_stride)
    elif projection is not None and backends.runs_native() and not wants_kernels(x):
        joining = infer_layer(source, projection, None)
    elif projection is not None:
        return conv_bn_act(contraction_of(u, layers[-1]), second=contraction_of(source, projection), act=act)[0]
    return infer_layer(u, layers[-1], act, joining)


def infer_stem(x: Tensor, layer: "Layer", pool: PoolGeometry) -> Tensor:
    """maxpool(relu(bn(conv(x)))) from running statistics; ``x`` in the dtype of the contraction."""
    if not wants_kernels(x):
        return max_pool2d(infer_layer(x, layer, "relu"), *pool)
    u, weight, geometry, *_ = contraction_of(channels_last(x), layer)
    y, _ = conv_forward(u, weight, geometry)
    return stem_pool(y, *_numbers_of(layer, x.dtype), pool, indices=False)[0]


def contraction_of(u: Tensor, layer: "Layer") -> Contraction:
    """A layer of running statistics as the operand of `conv_bn_act`."""
    weight = layer.tensors.weight
    if weight.dtype != u.dtype:  # under autocast
        weight = _once(layer, ("weight", u.dtype), lambda: layer.tensors.weight.detach().to(u.dtype))
    return Contraction(ConvInput(u), weight, layer.geometry, *_numbers_of(layer, u.dtype))


def _numbers_of(layer: "Layer", dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _once(layer, ("numbers", dtype), lambda: _numbers(layer, dtype))


def _numbers(layer: "Layer", dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What batch norm does to the convolution's output: its scale and shift."""
    norm = normaliser_of(None, layer.tensors.norm, layer.norm, dtype)
    scale, shift = norm.scale.detach(), norm.shift.detach()
    return (scale, shift) if layer.gain == 1 else (scale * layer.gain, shift * layer.gain)


def _fingerprint(layer: "Layer") -> tuple[Any, ...] | None:
    """Changes whenever a tensor of the layer is replaced or written to; None where torch does not count writes."""
    tensors = [tensor for tensor in layer.tensors if tensor is not None]
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return (layer.norm.eps, layer.gain, layer.geometry, *map(state_of, tensors))


def _once(layer: "Layer", kind: object, make: Callable[[], T]) -> T:
    """What ``make`` gives, made anew when a tensor of the layer has changed."""
    fingerprint = _fingerprint(layer)
    if fingerprint is None:
        return make()
    known = _folded.get(layer.tensors.weight)
    if known is None or known[0] != fingerprint:
        known = _folded[layer.tensors.weight] = (fingerprint, {})
    made: dict[object, T] = known[1]
    if kind not in made:
        made[kind] = make()
    return made[kind]


def _packed_layer(u: Tensor, layer: "Layer") -> onednn.PackedConv | None:
    if _fingerprint(layer) is None or layer.tensors.weight.dtype != u.dtype:
        return None

    def packed() -> onednn.PackedConv:
        _, weight, geometry, *_ = contraction_of(u, layer)
        scale, shift = _numbers_of(layer, u.dtype)
        folded = onednn.fold(weight.detach(), scale)
        return onednn.pack(onednn.PackedConv(folded, shift, geometry), tuple(u.shape))

    return _once(layer, "packed", packed)
