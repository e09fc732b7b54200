"""Fused forward passes of dense blocks, of the transitions between them, and of a DenseNet's stem and end."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fusedres.autograd import GlobalPool
from fusedres.autograd.shortcut import NO_SHORTCUT
from fusedres.nn.fused import Fused, FusedPass
from fusedres.nn.in_graph import Path, in_graph
from fusedres.nn.kinds import plain_type
from fusedres.nn.layers import bare_layer_of, layer_of, norm_of
from fusedres.nn.network import network_pass
from fusedres.nn.parts import (
    Named,
    NotFusable,
    Pair,
    check_fusable,
    pair_of,
    part,
    relu_part,
    why_not_bare,
    why_not_hooked,
    why_not_lone,
)
from fusedres.nn.patched import watches_of, why_patched
from fusedres.nn.stem import StemParts, run_stem_parts, stem_parts
from fusedres.operands import Geometry, Layer
from fusedres.patterns.bn_act import run_bn_act
from fusedres.patterns.choose import AUTO
from fusedres.patterns.dense import DenseLayerParts, run_dense, takes_dense
from fusedres.patterns.preact import run_preact
from fusedres.runtime import backends
from fusedres.runtime.autocast import contraction_dtype
from fusedres.runtime.launch import wants_kernels


class DenseParts(NamedTuple):
    """A dense layer taken apart: the batch norm of its input, the bottleneck if it has one, the last convolution."""

    norm: nn.Module
    inner: tuple[Pair, ...]
    last: nn.Module
    others: tuple[Named, ...]

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

    @property
    def others(self) -> tuple[Named, ...]:
        return tuple(other for layer in self.layers for other in layer.others)


def dense_layer_parts(block: nn.Module, name: str) -> DenseParts:
    """Take apart a layer with torchvision's names: norm1, relu1, conv1 and perhaps norm2, relu2, conv2.

    Raises:
        NotFusable: with the reason.
    """
    layer: Any = part(block, name)
    if getattr(layer, "drop_rate", 0) and layer.training:
        raise NotFusable(f"{name} drops values of its output")
    deep = hasattr(layer, "conv2")
    last = f"{name}.conv2" if deep else f"{name}.conv1"
    norm, conv = part(block, f"{name}.norm1"), part(block, last)
    check_fusable(why_not_lone(f"{name}.norm1", norm), why_not_bare(last, conv))
    inner = (pair_of(block, f"{name}.conv1", f"{name}.norm2"),) if deep else ()
    relus = (relu_part(block, f"{name}.{relu}") for relu in (("relu1", "relu2") if deep else ("relu1",)))
    return DenseParts(norm, inner, conv, ((name, layer), *relus))


def dense_block_parts(block: nn.Module, kind: type[nn.Module]) -> DenseBlockParts:
    """Take apart a block that holds nothing but layers of one class, ``kind``.

    Raises:
        NotFusable: with the reason.
    """
    layers = [(name, layer) for name, layer in block._modules.items() if layer is not None]
    if not layers:
        raise NotFusable("there are no layers")
    for name, layer in layers:
        if type(layer) is not kind:
            raise NotFusable(f"{name} is a {type(layer).__name__}, not a {kind.__name__}")
    check_fusable(why_patched(watches_of(kind)))
    return DenseBlockParts(tuple(dense_layer_parts(block, name) for name, _ in layers))


class FusedDenseBlock(FusedPass):
    """A dense block as one autograd node over one buffer of features."""

    def parts_now(self, x: Any) -> Any:
        return super().parts_now(x) if isinstance(x, Tensor) and takes_dense(x) else None

    def fused_pass(self, x: Tensor, parts: DenseBlockParts) -> Tensor:
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
    others: tuple[Named, ...]
    pairs: tuple[Pair, ...] = ()

    @property
    def convs(self) -> tuple[nn.Module, ...]:
        return (self.conv,)

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        return (self.norm,)


def transition_parts(module: nn.Module) -> TransitionParts:
    """Take apart a transition with torchvision's names.

    Raises:
        NotFusable: with the reason.
    """
    if set(module._modules) != {"norm", "relu", "conv", "pool"}:
        raise NotFusable(f"expected norm, relu, conv and pool, found {', '.join(module._modules)}")
    norm, conv, pool = (part(module, name) for name in ("norm", "conv", "pool"))
    check_fusable(why_not_lone("norm", norm), why_not_bare("conv", conv))
    return TransitionParts(norm, conv, pool, (relu_part(module, "relu"),))


class FusedTransition(FusedPass):
    """norm, relu and conv as one autograd node, then the pooling; on kernels that too, where the convolution is 1x1."""

    fused_parts = staticmethod(transition_parts)

    def fused_pass(self, x: Tensor, parts: TransitionParts) -> Tensor:
        layer, pool = bare_layer_of(parts.conv), cast(Any, parts.pool)
        # A library's convolutions gain nothing by a window.
        joined = _averages_behind(pool, layer, x) and (wants_kernels(x) or not backends.runs_native())
        if joined:
            layer = with_mean_behind(layer, *_pairs(pool), contraction_dtype(x))
        out = run_preact(
            x, norm_of(parts.norm), [layer], shortcut=NO_SHORTCUT, schedule=self.fused_schedule, measured=joined,
        )  # fmt: skip
        pooled: Tensor = out if joined else pool(out)
        return pooled


def with_mean_behind(layer: Layer, kernel: tuple[int, int], stride: tuple[int, int], dtype: torch.dtype) -> Layer:
    """A 1x1 convolution and the mean of a window behind it as one convolution, whose taps share the weight.

    Both are linear and the mean is the same for every channel: mean_t(W u_t) = sum_t (W / taps) u_t, so that nothing is
    written or read at the size before the pooling, forward or backward.
    """
    weight = layer.weight.to(dtype) / math.prod(kernel)
    weight = weight.expand(-1, -1, *kernel).contiguous(memory_format=torch.channels_last)
    return layer._replace(weight=weight, geometry=layer.geometry._replace(stride=stride))


def _averages_behind(pool: nn.Module, layer: Layer, x: Tensor) -> bool:
    """Whether ``pool`` takes means that `with_mean_behind` can; of 2, 4, 8, ... pixels, whose share of a weight is
    exact."""
    if type(pool) is not nn.AvgPool2d or why_not_hooked("pool", pool) is not None:
        return False
    kernel, _ = _pairs(pool)
    taps = math.prod(kernel)
    ordinary = not pool.ceil_mode and pool.divisor_override is None and pool.padding in (0, (0, 0))
    pointwise = layer.weight.shape[2:] == (1, 1) and layer.geometry == Geometry(groups=layer.geometry.groups)
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

    @property
    def others(self) -> tuple[Named, ...]:
        return () if self.stem is None else self.stem.others


NAMES = ("conv0", "norm0", "relu0", "pool0")
"""torchvision's names of the parts of a stem."""


def end_parts(model: nn.Module) -> EndParts:
    """Take apart a network with torchvision's names: features.conv0, norm0, relu0, pool0, ..., norm5.

    Raises:
        NotFusable: with the reason.
    """
    features = part(model, "features")
    if plain_type(features) is not nn.Sequential:
        raise NotFusable(f"features is a {type(features).__name__}, not a Sequential")
    names, modules = list(features._modules), [part(features, name) for name in features._modules]
    if len(names) < 2 or not names[-1].startswith("norm"):
        raise NotFusable("features does not end in a batch norm")
    check_fusable(why_not_hooked("features", features), why_not_lone(names[-1], modules[-1]))
    stem = stem_parts(features, NAMES) if tuple(names[:4]) == NAMES else None
    first = 0 if stem is None else len(NAMES)
    return EndParts(stem, tuple(modules[:first]), tuple(modules[first:-1]), modules[-1])


class FusedDenseEnds(Fused):
    """A DenseNet whose stem and whose last batch norm and ReLU run as one autograd node each."""

    fused_parts = staticmethod(end_parts)

    def fused_paths(self) -> tuple[Path, ...]:
        names = list(part(self, "features")._modules)
        stem = NAMES if tuple(names[:4]) == NAMES else ()
        return tuple(("features", name) for name in (*stem, names[-1]))

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_dynamo_compiling():
            return self._by_compiler(super().forward, x)
        parts: EndParts | None = self.parts_now(x)
        if parts is None:
            plain: Tensor = super().forward(x)
            return plain
        with network_pass(self, x):
            x = self.fused_first(x, parts)
            for module in parts.middle:
                x = module(x)
            x = self.fused_end(x, parts)
        classifier: Any = self.classifier
        logits: Tensor = classifier(torch.flatten(GlobalPool.apply(x), 1))
        return logits

    def fused_first(self, x: Tensor, parts: EndParts | None = None) -> Tensor:
        """What is given to the first dense block."""
        parts = self.parts_of(self) if parts is None else parts
        stem = None
        if parts.stem is not None:
            stem = self.attempt(parts, run_stem_parts, x, parts.stem, self.fused_schedule)
        if stem is not None:
            return stem
        for module in parts.first:
            x = module(x)
        return x

    def fused_end(self, x: Tensor, parts: EndParts | None = None) -> Tensor:
        """The last batch norm and ReLU."""
        parts = self.parts_of(self) if parts is None else parts
        end = self.attempt(parts, run_bn_act, x, norm_of(parts.norm))
        return torch.relu(parts.norm(x)) if end is None else end

    def _by_compiler(self, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        told = self.fused_told()
        if told is None:
            return plain(x)
        model: Any = self
        blocks = list(model.features.children())[len(told[1]) - 1 : -1]
        x = in_graph(self, "fused_first", plain, x)
        for block in blocks:
            x = block(x)
        x = in_graph(self, "fused_end", plain, x)
        logits: Tensor = model.classifier(torch.flatten(x.mean((2, 3), keepdim=True), 1))
        return logits
