"""What a live block is made of, and why it can not be fused if it can not."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from ..autograd.spec import ConvBN, NormSpec, NormTensors
from ..chain import Layer
from ..ops.contract import Geometry, PoolGeometry
from ..preact_chain import Norm
from .genuine import why_overridden
from .plain import NoShortcut, ZeroPadShortcut


class Pair(NamedTuple):
    """A convolution and the batch norm behind it, with the names they have in their block."""

    conv: nn.Module
    bn: nn.Module
    conv_name: str
    bn_name: str


class BlockParts(NamedTuple):
    """A residual block (or a single conv-BN-act) taken apart.

    ``shortcut`` is as in `run_chain`; ``others`` are modules that the plain forward calls and the fused one does not;
    ``pool`` is what averages a projection's input, as in the ResNet-D of He et al. 2019.
    """

    chain: tuple[Pair, ...]
    projection: Pair | None
    shortcut: str
    act: str | None
    zero_pad_stride: tuple[int, int]
    others: tuple[tuple[str, nn.Module], ...]
    pool: nn.Module | None = None

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The chain, and the projection last."""
        return self.chain if self.projection is None else (*self.chain, self.projection)

    @property
    def convs(self) -> tuple[nn.Module, ...]:
        return tuple(pair.conv for pair in self.pairs)

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        return tuple(pair.bn for pair in self.pairs)


class NotFusable(Exception):
    """Why a block is left alone."""


def part(module: nn.Module, name: str) -> nn.Module:
    """A part of a module, as the plain forward finds it.

    Raises:
        NotFusable: it is missing, or something else than a module.
    """
    found = module.__dict__.get(name, module._modules.get(name))
    if not isinstance(found, nn.Module):
        what = "is missing" if found is None else f"is a {type(found).__name__}, not a module"
        raise NotFusable(f"{name} {what}")
    return found


def residual_parts(block: nn.Module, depth: int, relus: Sequence[str] = ("relu",)) -> BlockParts:
    """Take apart a block with torchvision's names: conv1, bn1, ..., downsample, and those of its ReLUs.

    Raises:
        NotFusable: the shortcut is of a kind that no fused pass knows.
    """
    chain = tuple(pair_of(block, f"conv{i}", f"bn{i}") for i in range(1, depth + 1))
    others = [(name, part(block, name)) for name in relus]
    shortcut = getattr(block, "downsample", None)
    projection, pool, kind, zero_pad_stride = None, None, "identity", (1, 1)
    if type(shortcut) is nn.Sequential and (named := _projection(shortcut)):
        *before, (conv_name, conv), (bn_name, bn) = named
        projection, kind = Pair(conv, bn, f"downsample.{conv_name}", f"downsample.{bn_name}"), "projection"
        pool = before[0][1] if before else None
        others.append(("downsample", shortcut))
    elif type(shortcut) is ZeroPadShortcut:
        kind, zero_pad_stride = "zero_pad", (shortcut.stride, shortcut.stride)
        others.append(("downsample", shortcut))
    elif type(shortcut) is NoShortcut:
        kind = "none"
    elif shortcut is not None:
        raise NotFusable(f"downsample is a {type(shortcut).__name__}, not a convolution and a batch norm")
    return BlockParts(chain, projection, kind, "relu", zero_pad_stride, tuple(others), pool)


def pair_of(block: nn.Module, conv: str, bn: str, before: str = "") -> Pair:
    """A convolution and a batch norm by their names; ``before`` are those of what holds them."""
    return Pair(part(block, conv), part(block, bn), f"{before}{conv}", f"{before}{bn}")


def _projection(shortcut: nn.Sequential) -> list[tuple[str, nn.Module]]:
    """A convolution and a batch norm, perhaps behind average pooling, or nothing; what does nothing is left out, but
    in the place of a batch norm that was folded into the convolution."""
    every: list[tuple[str, Any]] = list(shortcut._modules.items())
    named = [(name, layer) for name, layer in every if type(layer) is not nn.Identity]
    if named and named[-1] != every[-1] and type(named[-1][1]) is nn.Conv2d:
        named.append(every[-1])
    pooled = len(named) == 3 and type(named[0][1]) is nn.AvgPool2d
    return named if len(named) == 2 or pooled else []


def why_not(parts: BlockParts) -> str | None:
    """The reason why these parts can not be fused, or None."""
    return why_not_pairs(parts.pairs) or why_not_others(parts.others)


def why_not_pairs(pairs: Iterable[Pair]) -> str | None:
    for conv, bn, conv_name, bn_name in pairs:
        reason = why_not_conv(conv_name, conv) or why_not_norm(bn_name, bn)
        reason = reason or why_not_hooked(conv_name, conv) or why_not_hooked(bn_name, bn)
        if reason:
            return reason
    return None


def why_not_conv(name: str, conv: nn.Module) -> str | None:
    if type(conv) is not nn.Conv2d:
        return f"{name} is a {type(conv).__name__}, not a plain Conv2d"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"{name} pads with {conv.padding_mode!r}, {conv.padding!r}; only zeros of a given width are fused"
    return None


def why_not_norm(name: str, bn: nn.Module) -> str | None:
    if type(bn) is nn.Identity:  # folded into the convolution
        return f"{name} is an Identity, which is fused in evaluation alone" if bn.training else None
    if type(bn) is not nn.BatchNorm2d:
        return f"{name} is a {type(bn).__name__}, not a plain BatchNorm2d"
    if bn.momentum is not None and not math.isfinite(bn.momentum):
        return f"{name}.momentum is {bn.momentum}"
    return None


def why_not_bare(name: str, conv: nn.Module) -> str | None:
    """The same of a convolution without a batch norm behind it."""
    reason = why_not_conv(name, conv)
    if reason is None and getattr(conv, "bias", None) is not None:
        reason = f"{name} has a bias and no batch norm behind it"
    return reason or why_not_hooked(name, conv)


# What modules are called that have to be ReLUs: torchvision's and the project's, timm's.
RELUS = ("relu", "act1", "act2", "act3")


def why_not_others(others: Iterable[tuple[str, nn.Module]]) -> str | None:
    for name, module in others:
        if name.endswith(RELUS) and type(module) is not nn.ReLU:
            return f"{name} is a {type(module).__name__}, not a plain ReLU"
        reason = why_not_hooked(name, module)
        if reason:
            return reason
    return None


def why_not_hooked(name: str, module: nn.Module) -> str | None:
    """Whether somebody waits for a call of an inner module."""
    # A fused pass does not call the inner modules, so nothing may wait for such a call.
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{name} has hooks, which a fused pass would not call"
    return why_overridden(name, module)


def layer_of(pair: Pair) -> Layer:
    """The tensors and numbers of a live convolution and batch norm, as a call in its present mode uses them."""
    norm = norm_of(pair.bn)
    gamma, beta, running_mean, running_var, _, counted = norm.tensors
    weight, bias = convolution_tensors(pair.conv)
    tensors = ConvBN(weight, bias, gamma, beta, running_mean, running_var, counted)
    return Layer(tensors, _geometry_of(pair.conv), norm.spec)


def bare_layer_of(conv: nn.Module) -> Layer:
    """A live convolution without a batch norm."""
    weight, _ = convolution_tensors(conv)
    return Layer(ConvBN(weight), _geometry_of(conv), NormSpec(batch_stats=False))


def convolution_tensors(conv: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias as the plain forward finds them: parameters, or what a wrapper computes in their place.

    Raises:
        NotFusable: one is missing, or of a class that computes in its own way.
    """
    weight = _tensor("weight", conv)
    if weight is None:
        raise NotFusable("a convolution has no weight")
    return weight, _tensor("bias", conv)


def _tensor(name: str, module: nn.Module) -> Tensor | None:
    tensor = getattr(module, name, None)
    if tensor is not None and type(tensor) not in PLAIN_TENSORS:
        raise NotFusable(f"{name} of a {type(module).__name__} is a {type(tensor).__name__}, not a plain tensor")
    return None if tensor is None else tensor.resolve_neg()


PLAIN_TENSORS = (nn.Parameter, Tensor, nn.Buffer)


def _geometry_of(conv: nn.Module) -> Geometry:
    assert isinstance(conv, nn.Conv2d)
    stride, padding, dilation = map(_pair, (conv.stride, conv.padding, conv.dilation))  # type: ignore[arg-type]
    return Geometry(stride, padding, dilation, conv.groups)


def norm_of(bn: nn.Module) -> Norm:
    """The tensors and numbers of a live batch norm, as a call in its present mode uses them; none of an Identity."""
    if type(bn) is nn.Identity:
        return Norm(NormTensors(), NormSpec(batch_stats=False))
    assert isinstance(bn, nn.BatchNorm2d)
    gamma, beta, running_mean, running_var, counted = (_tensor(name, bn) for name in _OF_NORM)
    batch_stats = bn.training or running_mean is None
    # Only who measures a batch for the running statistics counts it.
    if not (bn.training and bn.track_running_stats):
        counted = None
    momentum = bn.momentum
    if momentum is None:  # a cumulative average: the k-th batch weighs 1 / k
        momentum = 0.0 if counted is None else 1.0 / (float(counted) + 1.0)
    if bn.training and not bn.track_running_stats:
        running_mean = running_var = None
    tensors = NormTensors(gamma, beta, running_mean, running_var, counted=counted)
    return Norm(tensors, NormSpec(bn.eps, momentum, batch_stats))


_OF_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class StemParts(NamedTuple):
    """The first layers of a network taken apart: convolution, batch norm, ReLU, and max-pooling if there is one.

    ``before`` are the layers before that convolution, each with a ReLU, in a deep stem.
    """

    pair: Pair
    pool: PoolGeometry | None
    others: tuple[tuple[str, nn.Module], ...]
    before: tuple[Pair, ...] = ()

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """In the order in which they run."""
        return (*self.before, self.pair)

    @property
    def convs(self) -> tuple[nn.Module, ...]:
        return tuple(pair.conv for pair in self.pairs)

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        return tuple(pair.bn for pair in self.pairs)


def stem_parts(model: nn.Module, relu: str = "relu") -> StemParts:
    """Take apart a stem with torchvision's names: conv1, bn1, maxpool (which may be missing), and that of its ReLU.

    Raises:
        NotFusable: there is no batch norm, or the pooling is of a kind that no fused pass knows.
    """
    if getattr(model, "bn1", None) is None:
        raise NotFusable("conv1 has no batch norm behind it")
    conv, bn = part(model, "conv1"), part(model, "bn1")
    others = [(relu, part(model, relu))]
    pair, before = Pair(conv, bn, "conv1", "bn1"), []
    if type(conv) is nn.Sequential and len(conv) % 3 == 1:
        *named, (last, module) = conv._modules.items()
        for i in range(0, len(named), 3):
            (conv_name, inner), (bn_name, norm), (relu_name, act) = cast(Any, named[i : i + 3])
            before.append(Pair(inner, norm, f"conv1.{conv_name}", f"conv1.{bn_name}"))
            if type(act) is not nn.ReLU:
                raise NotFusable(f"conv1.{relu_name} is a {type(act).__name__}, not a plain ReLU")
            others.append((f"conv1.{relu_name}", act))
        pair = Pair(module, bn, f"conv1.{last}", "bn1")
        others.append(("conv1", conv))
    pool = getattr(model, "maxpool", None)
    if pool is not None:
        others.append(("maxpool", part(model, "maxpool")))
    geometry = None if pool is None or type(pool) is nn.Identity else _pool_geometry(pool)
    return StemParts(pair, geometry, tuple(others), tuple(before))


def _pool_geometry(pool: nn.Module) -> PoolGeometry:
    if type(pool) is not nn.MaxPool2d:
        raise NotFusable(f"maxpool is a {type(pool).__name__}, not a plain MaxPool2d")
    kernel, stride, padding, dilation = (_pair(v) for v in (pool.kernel_size, pool.stride, pool.padding, pool.dilation))
    if dilation != (1, 1) or pool.ceil_mode or pool.return_indices:
        raise NotFusable("maxpool is dilated, rounds up or returns indices")
    return PoolGeometry(kernel, stride, padding)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    """What PyTorch takes for both directions; set on a live module it may be a number or a list."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])
