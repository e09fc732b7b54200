"""Inference: every convolution with its batch norm, shortcut and ReLU is one call, batch norm folded in once."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d
from torch.utils.weak import WeakIdKeyDictionary

from . import backends
from .autograd.layer import normaliser_of
from .launch import wants_kernels
from .ops import onednn
from .ops.contract import ConvInput, Geometry, PoolGeometry, channels_last
from .ops.conv_bn_act import Contraction, conv_bn_act
from .ops.conv_forward import conv_forward
from .ops.stem_pool import stem_pool
from .ops.zero_pad_shortcut import ZeroPadded, written
from .replay import replayed
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
    # Who follows calls (counts FLOPs, runs without memory) knows nothing of packed weights.
    packs = backends.runs_native() and onednn.runs(u) and not torch._C._len_torch_dispatch_stack()
    if packs and (residual is None or residual.dtype == u.dtype):
        packed = _packed_layer(u, layer)
        if packed is not None:
            return onednn.conv_act(u, packed, written(residual), act)
    return conv_bn_act(Contraction(ConvInput(u), *folded_layer(layer, u.dtype)), residual=residual, act=act)[0]


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
    if wants_kernels(x):
        folded = tuple(folded_layer(layer, dtype) for layer in layers)
        second = None if projection is None else folded_layer(projection, dtype)
        return replayed(_chain_of_kernels, x, dtype, folded, second, shortcut, residual, zero_pad_stride, act)
    x = channels_last(x)
    source = u = x.to(dtype)
    for layer in layers[:-1]:
        u = infer_layer(u, layer, "relu")
    joining: Tensor | ZeroPadded | None = residual
    if shortcut == "identity":
        joining = x
    elif shortcut == "zero_pad":
        joining = ZeroPadded(x, layers[-1].tensors.weight.shape[0], zero_pad_stride)
    elif projection is not None:
        joining = infer_layer(source, projection, None)
    return infer_layer(u, layers[-1], act, joining)


class Folded(NamedTuple):
    """A layer of running statistics, as `Contraction` takes it: its weight in the contraction's dtype, its numbers."""

    weight: Tensor
    geometry: Geometry
    scale: Tensor
    shift: Tensor


def _chain_of_kernels(
    x: Tensor, dtype: torch.dtype, layers: tuple[Folded, ...], projection: Folded | None, shortcut: str,
    residual: Tensor | None, zero_pad_stride: tuple[int, int], act: str | None,
) -> Tensor:  # fmt: skip
    x = channels_last(x)
    source = u = ConvInput(x.to(dtype))
    *inner, last = layers
    for layer in inner:
        u = ConvInput(conv_bn_act(Contraction(u, *layer), act="relu")[0])
    joining: Tensor | ZeroPadded | None = residual
    if shortcut == "identity":
        joining = x
    elif shortcut == "zero_pad":
        joining = ZeroPadded(x, last.weight.shape[0], zero_pad_stride)
    second = None if projection is None else Contraction(source, *projection)
    return conv_bn_act(Contraction(u, *last), residual=joining, second=second, act=act)[0]


def infer_stem(x: Tensor, layer: "Layer", pool: PoolGeometry) -> Tensor:
    """maxpool(relu(bn(conv(x)))) from running statistics; ``x`` in the dtype of the contraction."""
    if not wants_kernels(x):
        return max_pool2d(infer_layer(x, layer, "relu"), *pool)
    return replayed(_stem_of_kernels, x, folded_layer(layer, x.dtype), pool)


def _stem_of_kernels(x: Tensor, layer: Folded, pool: PoolGeometry) -> Tensor:
    y, _ = conv_forward(ConvInput(channels_last(x)), layer.weight, layer.geometry)
    return stem_pool(y, layer.scale, layer.shift, pool, indices=False)[0]


def folded_layer(layer: "Layer", dtype: torch.dtype) -> Folded:
    """A layer with its batch norm folded, once as long as its tensors are not written to."""
    weight, scale, shift = _once(layer, dtype, lambda: _folding(layer, dtype))
    return Folded(layer.tensors.weight if weight is None else weight, layer.geometry, scale, shift)


def _folding(layer: "Layer", dtype: torch.dtype) -> tuple[Tensor | None, Tensor, Tensor]:
    """The weight in another dtype than its own (under autocast), and batch norm's scale and shift."""
    weight, norm = layer.tensors.weight, normaliser_of(None, layer.tensors.norm, layer.norm, dtype)
    rounded = None if weight.dtype == dtype else weight.detach().to(dtype)
    return rounded, norm.scale.detach() * layer.gain, norm.shift.detach() * layer.gain


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
        weight, geometry, scale, shift = folded_layer(layer, u.dtype)
        folded = onednn.fold(weight.detach(), scale)
        return onednn.pack(onednn.PackedConv(folded, shift, geometry), tuple(u.shape))

    return _once(layer, "packed", packed)
