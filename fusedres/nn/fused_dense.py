"""Fused forward passes of dense blocks, of the transitions between them, and of a DenseNet's stem and end."""

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .. import backends
from ..autocast import contraction_dtype
from ..autograd import GlobalPool
from ..chain import Layer, run_chain, run_stem
from ..dense_chain import DenseLayerParts, run_dense, takes_dense
from ..launch import wants_kernels
from ..ops.contract import Geometry
from ..plan import AUTO
from ..preact_chain import run_bn_act, run_preact
from .fused import Fused, FusedPass
from .genuine import watched, why_patched
from .network import network_pass
from .parts import (
    NotFusable,
    Pair,
    StemParts,
    bare_layer_of,
    layer_of,
    norm_of,
    pair_of,
    part,
    stem_parts,
    why_not_bare,
    why_not_hooked,
    why_not_norm,
    why_not_others,
    why_not_pairs,
)


class DenseParts(NamedTuple):
    """A dense layer taken apart: the batch norm of its input, the bottleneck if it has one, the last convolution."""

    norm: nn.Module
    inner: tuple[Pair, ...]
    last: nn.Module

    @property
    def convs(self) -> tuple[nn.Module, ...]:
        return (*(pair.conv for pair in self.inner), self.last)

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        return (self.norm, *(pair.bn for pair in self.inner))


class DenseBlockParts(NamedTuple):
    """A dense block taken apart."""

    layers: tuple[DenseParts, ...]

    @property
    def pairs(self) -> tuple[Pair, ...]:
        return tuple(pair for layer in self.layers for pair in layer.inner)

    @property
    def convs(self) -> tuple[nn.Module, ...]:
        return tuple(conv for layer in self.layers for conv in layer.convs)

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        return tuple(norm for layer in self.layers for norm in layer.norms)


def dense_parts(name: str, layer: nn.Module) -> DenseParts:
    """Take apart a layer with torchvision's names: norm1, relu1, conv1 and perhaps norm2, relu2, conv2.

    Raises:
        NotFusable: with the reason.
    """
    if getattr(layer, "drop_rate", 0) and layer.training:
        raise NotFusable(f"{name} drops values of its output")
    inner: tuple[Pair, ...] = ()
    last = "conv1"
    relus = ["relu1"]
    if hasattr(layer, "conv2"):
        inner = (pair_of(layer, "conv1", "norm2", f"{name}."),)
        last = "conv2"
        relus.append("relu2")
    norm, first = part(layer, "norm1"), f"{name}.norm1"
    others = [(f"{name}.{relu}", part(layer, relu)) for relu in relus]
    reason = (
        why_not_hooked(name, layer)
        or why_not_norm(first, norm)
        or why_not_hooked(first, norm)
        or why_not_pairs(inner)
        or why_not_bare(f"{name}.{last}", part(layer, last))
        or why_not_relus(others)
    )
    if reason:
        raise NotFusable(reason)
    return DenseParts(norm, inner, part(layer, last))


def why_not_relus(relus: list[tuple[str, nn.Module]]) -> str | None:
    for name, relu in relus:
        if type(relu) is not nn.ReLU:
            return f"{name} is a {type(relu).__name__}, not a plain ReLU"
    return why_not_others(relus)


class FusedDenseBlock(FusedPass):
    """A dense block as one autograd node over one buffer of features."""

    dense_layer: type[nn.Module] = nn.Module
    """The class of its layers."""

    @classmethod
    def parts_of(cls, module: nn.Module) -> DenseBlockParts:
        layers = [(name, layer) for name, layer in module._modules.items() if layer is not None]
        if not layers:
            raise NotFusable("there are no layers")
        for name, layer in layers:
            if type(layer) is not cls.dense_layer:
                raise NotFusable(f"{name} is a {type(layer).__name__}, not a {cls.dense_layer.__name__}")
        reason = why_patched(watched(cls.dense_layer))
        if reason:
            raise NotFusable(reason)
        return DenseBlockParts(tuple(dense_parts(name, layer) for name, layer in layers))

    def parts_now(self, x: Any) -> Any:
        return super().parts_now(x) if isinstance(x, Tensor) and takes_dense(x) else None

    def _run(self, x: Tensor, parts: DenseBlockParts) -> Tensor:
        layers = [
            DenseLayerParts(norm_of(layer.norm), (*(layer_of(pair) for pair in layer.inner), bare_layer_of(layer.last)))
            for layer in parts.layers
        ]
        return run_dense(x, layers, schedule=self._schedule())

    def _schedule(self) -> str:
        # torchvision's option to form again in backward what would be kept is what the prologue does.
        frugal = any(getattr(layer, "memory_efficient", False) for layer in self._modules.values())
        return "prologue" if frugal and self.fused_schedule == AUTO else self.fused_schedule


class TransitionParts(NamedTuple):
    """A transition taken apart."""

    norm: nn.Module
    conv: nn.Module
    pool: nn.Module
    pairs: tuple[Pair, ...] = ()

    @property
    def convs(self) -> tuple[nn.Module, ...]:
        return (self.conv,)

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        return (self.norm,)


class FusedTransition(FusedPass):
    """norm, relu and conv as one autograd node, then the pooling; on kernels that too, where the convolution is 1x1."""

    @classmethod
    def parts_of(cls, module: nn.Module) -> TransitionParts:
        if set(module._modules) != {"norm", "relu", "conv", "pool"}:
            raise NotFusable(f"expected norm, relu, conv and pool, found {', '.join(module._modules)}")
        norm, relu, conv, pool = (part(module, name) for name in ("norm", "relu", "conv", "pool"))
        reason = why_not_norm("norm", norm) or why_not_hooked("norm", norm) or why_not_bare("conv", conv)
        reason = reason or why_not_relus([("relu", relu)])
        if reason:
            raise NotFusable(reason)
        return TransitionParts(norm, conv, pool)

    def _run(self, x: Tensor, parts: TransitionParts) -> Tensor:
        layer, pool = bare_layer_of(parts.conv), cast(Any, parts.pool)
        # A library's convolutions gain nothing by a window.
        joined = _averages_behind(pool, layer, x) and (wants_kernels(x) or not backends.runs_native())
        if joined:
            layer = averaged(layer, *_pairs(pool), contraction_dtype(x))
        out = run_preact(
            x, norm_of(parts.norm), [layer], shortcut="none", schedule=self.fused_schedule, measured=joined,
        )  # fmt: skip
        pooled: Tensor = out if joined else pool(out)
        return pooled


def averaged(layer: Layer, kernel: tuple[int, int], stride: tuple[int, int], dtype: torch.dtype) -> Layer:
    """A 1x1 convolution and the mean of a window behind it as one convolution, whose taps share the weight.

    Both are linear and the mean is the same for every channel: mean_t(W u_t) = sum_t (W / taps) u_t, so that nothing is
    written or read at the size before the pooling, forward or backward.
    """
    weight = layer.tensors.weight.to(dtype) / math.prod(kernel)
    weight = weight.expand(-1, -1, *kernel).contiguous(memory_format=torch.channels_last)
    return layer._replace(
        tensors=layer.tensors._replace(weight=weight), geometry=layer.geometry._replace(stride=stride)
    )


def _averages_behind(pool: nn.Module, layer: Layer, x: Tensor) -> bool:
    """Whether ``pool`` takes means that `averaged` can; of 2, 4, 8, ... pixels, whose share of a weight is exact."""
    if type(pool) is not nn.AvgPool2d or why_not_hooked("pool", pool) is not None:
        return False
    kernel, _ = _pairs(pool)
    taps = math.prod(kernel)
    ordinary = not pool.ceil_mode and pool.divisor_override is None and pool.padding in (0, (0, 0))
    pointwise = layer.tensors.weight.shape[2:] == (1, 1) and layer.geometry == Geometry(groups=layer.geometry.groups)
    fits = x.dim() == 4 and x.shape[2] >= kernel[0] and x.shape[3] >= kernel[1]
    return ordinary and pointwise and fits and taps & (taps - 1) == 0


def _pairs(pool: nn.AvgPool2d) -> tuple[tuple[int, int], tuple[int, int]]:
    """Kernel and stride."""
    kernel, stride = ((v, v) if isinstance(v, int) else (v[0], v[1]) for v in (pool.kernel_size, pool.stride))
    return kernel, stride


class EndParts(NamedTuple):
    """What a DenseNet has around its blocks: the stem, None if it is a convolution alone, and the last batch norm.

    ``first`` are the modules that the stem stands for, ``middle`` those between it and the last.
    """

    stem: StemParts | None
    first: tuple[nn.Module, ...]
    middle: tuple[nn.Module, ...]
    norm: nn.Module

    @property
    def pairs(self) -> tuple[Pair, ...]:
        return () if self.stem is None else self.stem.pairs

    @property
    def convs(self) -> tuple[nn.Module, ...]:
        return () if self.stem is None else self.stem.convs

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        return (self.norm,) if self.stem is None else (*self.stem.norms, self.norm)


def end_parts(model: nn.Module) -> EndParts:
    """Take apart a network with torchvision's names: features.conv0, norm0, relu0, pool0, ..., norm5.

    Raises:
        NotFusable: with the reason.
    """
    features: Any = part(model, "features")
    if type(features) is not nn.Sequential:
        raise NotFusable(f"features is a {type(features).__name__}, not a Sequential")
    reason = why_not_hooked("features", features)
    names, modules = list(features._modules), list(features._modules.values())
    if len(names) < 2 or not names[-1].startswith("norm"):
        raise NotFusable("features does not end in a batch norm")
    reason = reason or why_not_norm(names[-1], modules[-1]) or why_not_hooked(names[-1], modules[-1])
    stem, first = None, 0
    if names[:4] == ["conv0", "norm0", "relu0", "pool0"]:
        stand_in = nn.Module()
        stand_in._modules = dict(zip(("conv1", "bn1", "relu", "maxpool"), modules[:4], strict=True))
        stem, first = stem_parts(stand_in), 4
        reason = reason or why_not_pairs(stem.pairs) or why_not_others(stem.others)
    if reason:
        raise NotFusable(reason)
    return EndParts(stem, tuple(modules[:first]), tuple(modules[first:-1]), modules[-1])


class FusedDenseEnds(Fused):
    """A DenseNet whose stem and whose last batch norm and ReLU run as one autograd node each."""

    @classmethod
    def parts_of(cls, module: nn.Module) -> EndParts:
        return end_parts(module)

    def forward(self, x: Tensor) -> Tensor:
        parts: EndParts | None = self.parts_now(x)
        if parts is None:
            plain: Tensor = super().forward(x)
            return plain
        with network_pass(self, x):
            stem = None if parts.stem is None else self.attempt(parts, self._run_stem, x, parts.stem)
            for module in parts.first if stem is None else ():
                x = module(x)
            x = x if stem is None else stem
            for module in parts.middle:
                x = module(x)
            end = self.attempt(parts, run_bn_act, x, norm_of(parts.norm))
            x = torch.relu(parts.norm(x)) if end is None else end
        classifier: Any = self.classifier
        logits: Tensor = classifier(torch.flatten(GlobalPool.apply(x), 1))
        return logits

    def _run_stem(self, x: Tensor, stem: StemParts) -> Tensor:
        layer = layer_of(stem.pair)
        if stem.pool is None:
            return run_chain(x, [layer], schedule=self.fused_schedule)
        return run_stem(x, layer, stem.pool, schedule=self.fused_schedule)
