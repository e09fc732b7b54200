"""Residual chains as tables of numbers, run by plain PyTorch and by ConvChain from the same tensors."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, pad

from fusedres.activation import IDENTITY, RELU, Activation
from fusedres.autograd import ConvChain
from fusedres.autograd.shortcut import NO_SHORTCUT, Identity, Projection, Residual, Shortcut, ZeroPad
from fusedres.autograd.spec import ChainSpec, LayerSpec
from fusedres.operands import Geometry, NormNumbers
from fusedres.patterns.choose import LIBRARY
from fusedres.plan.schedule import SCHEDULES, Schedule
from fusedres.runtime import backends
from fusedres.runtime.call import Call

ALL_SCHEDULES = {**SCHEDULES, "library": LIBRARY}
EPS, MOMENTUM = 1e-3, 0.2


@dataclass(frozen=True)
class Conv:
    """K, kernel and geometry of a convolution, and how its batch norm is."""

    k: int
    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    bias: bool = False
    affine: bool = True
    frozen: bool = False
    running: bool = True
    gamma: str = "random"
    open: bool = False
    """Shifted so far that its ReLU hardly ever closes, nor flips within rounding."""

    @property
    def geometry(self) -> Geometry:
        padding = self.dilation * (self.kernel // 2)
        return Geometry(*((n, n) for n in (self.stride, padding, self.dilation)), self.groups)

    @property
    def pointwise(self) -> bool:
        return self.kernel == 1 and self.groups == 1


@dataclass(frozen=True)
class Case:
    size: tuple[int, int, int, int]
    layers: tuple[Conv, ...]
    shortcut: str = "none"
    projection: Conv | None = None
    act: Activation = RELU
    stride: int = 1
    """Of a zero-pad shortcut."""
    inner: Activation = RELU
    """Behind every layer but the last."""
    image: str = "random"

    @property
    def every(self) -> tuple[Conv, ...]:
        return (*self.layers, self.projection) if self.projection else self.layers

    def each(self, **changes) -> "Case":
        """The same chain with every layer changed."""
        layers = tuple(replace(layer, **changes) for layer in self.layers)
        projection = replace(self.projection, **changes) if self.projection else None
        return replace(self, layers=layers, projection=projection)


class LayerTensors(NamedTuple):
    """In the order of `Layer.tensors`."""

    weight: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    bias: Tensor | None
    counted: Tensor | None = None

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.gamma, self.beta, self.bias


PARAMETER_NAMES = ("weight", "gamma", "beta", "bias")


@dataclass
class Tensors:
    """The tensors of a case; `to` gives leaves of another dtype with the same values."""

    x: Tensor
    residual: Tensor | None
    layers: list[LayerTensors]
    dz: Tensor | None = field(default=None)

    def to(self, dtype: torch.dtype, parameters: torch.dtype | None = None) -> "Tensors":
        def copied(tensor: Tensor | None, to: torch.dtype, grad: bool) -> Tensor | None:
            if tensor is None:
                return None
            return tensor.detach().clone().to(to).requires_grad_(grad and tensor.requires_grad)

        own = parameters or dtype
        layers = [LayerTensors(*(copied(t, own, True) for t in layer)) for layer in self.layers]
        dz = None if self.dz is None else self.dz.to(dtype)
        return Tensors(copied(self.x, dtype, True), copied(self.residual, dtype, True), layers, dz)

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Everything that can have a gradient, by name."""
        named = {"x": self.x, "residual": self.residual}
        for i, layer in enumerate(self.layers):
            named |= {f"{name}{i}": t for name, t in zip(PARAMETER_NAMES, layer.parameters, strict=True)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def running(self) -> dict[str, Tensor]:
        named = {}
        for i, layer in enumerate(self.layers):
            named |= {f"running_mean{i}": layer.running_mean, f"running_var{i}": layer.running_var}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def tensors_of(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensors:
    """Drawn in fp64, every leaf asking for its gradient."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    def layer_of(conv: Conv, channels: int) -> LayerTensors:
        fan_in = channels // conv.groups * conv.kernel**2
        weight = draw(conv.k, channels // conv.groups, conv.kernel, conv.kernel) * (2 / fan_in) ** 0.5
        gamma, beta = 1 + 0.3 * draw(conv.k), 0.3 * draw(conv.k)
        if conv.gamma == "zero":
            gamma = torch.zeros_like(gamma)
        elif conv.gamma == "zero, and beta":
            gamma, beta = torch.zeros_like(gamma), torch.zeros_like(beta)
        elif conv.gamma == "negative":
            gamma = -gamma.abs()
        elif conv.gamma == "one channel zero":
            gamma[0] = 0
        if conv.open:
            beta = beta + 6
        return LayerTensors(
            weight,
            gamma if conv.affine else None,
            beta if conv.affine else None,
            bias=draw(conv.k) if conv.bias else None,
            running_mean=0.5 * draw(conv.k) if conv.running else None,
            running_var=draw(conv.k).abs() + 0.5 if conv.running else None,
        )

    x = draw(*case.size)
    if case.image == "constant":
        x = torch.full_like(x, 0.7)
    channels, layers = case.size[1], []
    for conv in case.layers:
        layers.append(layer_of(conv, channels))
        channels = conv.k
    if case.projection:
        layers.append(layer_of(case.projection, case.size[1]))
    tensors = Tensors(x, None, layers)
    with torch.no_grad():
        z = _chain(tensors.to(torch.float64), case)
    tensors.dz = draw(*z.shape)
    if case.shortcut == "residual":
        tensors.residual = draw(*z.shape)
    for leaf in tensors.leaves.values():
        leaf.requires_grad_()
    return tensors.to(dtype)


def _layer(u: Tensor, tensors: LayerTensors, conv: Conv) -> Tensor:
    weight, gamma, beta, running_mean, running_var, bias, _ = tensors
    y = conv2d(u, weight, bias, *conv.geometry)
    return batch_norm(y, running_mean, running_var, gamma, beta, not conv.frozen, MOMENTUM, EPS)


def _chain(tensors: Tensors, case: Case, inner: list[Tensor] | None = None) -> Tensor:
    u = tensors.x
    for i, conv in enumerate(case.layers):
        u = _layer(u, tensors.layers[i], conv)
        if i < len(case.layers) - 1:
            u = case.inner.value(u)
            if inner is not None:
                inner.append(u)
    return u


def eager(tensors: Tensors, case: Case, inner: list[Tensor] | None = None) -> Tensor:
    """Plain PyTorch; updates the running statistics. ``inner`` collects the rectified tensors inside the chain."""
    z = before_act(tensors, case, inner)
    return case.act.value(z)


def before_act(tensors: Tensors, case: Case, inner: list[Tensor] | None = None) -> Tensor:
    z = _chain(tensors, case, inner)
    if case.shortcut == "identity":
        z = z + tensors.x
    elif case.shortcut == "residual":
        z = z + tensors.residual
    elif case.shortcut == "zero_pad":
        x = tensors.x[:, :, :: case.stride, :: case.stride]
        before = (z.shape[1] - x.shape[1]) // 2
        z = z + pad(x, (0, 0, 0, 0, before, z.shape[1] - x.shape[1] - before))
    elif case.projection:
        z = z + _layer(tensors.x, tensors.layers[-1], case.projection)
    return z


def kink_margin(tensors: Tensors, case: Case) -> float:
    """How near the input of any ReLU comes to zero."""
    margins, u = [], tensors.x
    with torch.no_grad():
        for i, conv in enumerate(case.layers[:-1]):
            y = _layer(u, tensors.layers[i], conv)
            margins.append(float(y.abs().min()))
            u = case.inner.value(y)
        if not case.act.is_identity:
            margins.append(float(before_act(tensors, case).abs().min()))
    return min(margins, default=1.0)


def shortcut_of(case: Case, projection: LayerSpec | None) -> Shortcut:
    if projection is not None:
        return Projection(projection)
    kinds = {"identity": Identity(), "zero_pad": ZeroPad((case.stride, case.stride)), "residual": Residual()}
    return kinds.get(case.shortcut, NO_SHORTCUT)


def spec_of(
    case: Case,
    schedule: Schedule,
    dtype: torch.dtype,
    moments: tuple[bool, bool] | None = None,
    call: Call | None = None,
) -> ChainSpec:
    """``moments``: whether the last convolution and the projection take that form; by default as the schedule says."""
    main, projected = moments or (schedule.moments, schedule.moments)

    def layer(conv: Conv, wanted: bool) -> LayerSpec:
        norm = NormNumbers(EPS, MOMENTUM, not conv.frozen)
        return LayerSpec(conv.geometry, norm, case.inner, wanted and conv.pointwise)

    last = len(case.layers) - 1
    return ChainSpec(
        call=call or Call(dtype, backend=backends.current()),
        schedule=schedule,
        layers=tuple(layer(conv, main and i == last) for i, conv in enumerate(case.layers)),
        shortcut=shortcut_of(case, layer(case.projection, projected) if case.projection else None),
        act=case.act,
    )


def fused(
    tensors: Tensors,
    case: Case,
    schedule: Schedule,
    moments: tuple[bool, bool] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    flat = [tensor for layer in tensors.layers for tensor in layer]
    call = replace(Call.on(tensors.x, (tensors.residual, *flat)), dtype=dtype or tensors.x.dtype)
    spec = spec_of(case, schedule, call.dtype, moments, call)
    return ConvChain.apply(tensors.x, tensors.residual, spec, *flat)


def moments_forms(case: Case) -> list[tuple[bool, bool]]:
    """Every choice of the moments form that the chain's kernels allow."""
    main = [False, True] if case.layers[-1].pointwise else [False]
    other = [False, True] if case.projection and case.projection.pointwise else [False]
    return [(a, b) for a in main for b in other]


def gradients(z: Tensor, tensors: Tensors, **keywords) -> dict[str, Tensor | None]:
    """By name, of every leaf that asks for one."""
    wanted = {name: leaf for name, leaf in tensors.leaves.items() if leaf.requires_grad}
    dz = tensors.dz.to(z.dtype)
    found = torch.autograd.grad(z, list(wanted.values()), dz, allow_unused=True, **keywords)
    return dict(zip(wanted, found, strict=True))


BASIC = (Conv(6, 3), Conv(6, 3))
BOTTLENECK = (Conv(3), Conv(3, 3), Conv(12))
BLOCK = Case((2, 12, 5, 4), BOTTLENECK, "identity")
PROJECTED = Case((2, 5, 6, 4), BOTTLENECK, projection=Conv(12))
STRIDED = Case((2, 5, 7, 5), (Conv(3), Conv(3, 3, stride=2), Conv(12)), projection=Conv(12, stride=2))

CASES = {
    "basic block": Case((2, 6, 6, 6), BASIC, "identity"),
    "basic block, odd size": Case((2, 6, 7, 5), BASIC, "identity"),
    "basic block, strided projection": Case(
        (2, 5, 6, 6), (Conv(6, 3, stride=2), Conv(6, 3)), projection=Conv(6, stride=2)
    ),
    "basic block, strided projection, odd size": Case(
        (2, 5, 7, 9), (Conv(6, 3, stride=2), Conv(6, 3)), projection=Conv(6, stride=2)
    ),
    "basic block, 3x3 projection": Case((2, 5, 6, 6), BASIC, projection=Conv(6, 3)),
    "basic block, zero-pad, odd difference": Case(
        (2, 4, 7, 6), (Conv(7, 3, stride=2), Conv(7, 3)), "zero_pad", stride=2
    ),
    "basic block, one image": Case((1, 6, 5, 5), BASIC, "identity"),
    "bottleneck": BLOCK,
    "bottleneck, one image": Case((1, 12, 5, 5), BOTTLENECK, "identity"),
    "bottleneck, one pixel an image": Case((5, 12, 1, 1), BOTTLENECK, "identity"),
    "bottleneck, projection": PROJECTED,
    "bottleneck, strided projection, odd size": STRIDED,
    "bottleneck, stride in the last 1x1": Case(
        (2, 5, 7, 5), (Conv(3), Conv(3, 3), Conv(12, stride=2)), projection=Conv(12, stride=2)
    ),
    "bottleneck, stride in the first 1x1": Case(
        (2, 5, 6, 7), (Conv(3, stride=2), Conv(3, 3), Conv(12)), projection=Conv(12, stride=2)
    ),
    "bottleneck, grouped": Case((2, 16, 5, 5), (Conv(4), Conv(4, 3, groups=2), Conv(16)), "identity"),
    "bottleneck, dilated": Case((2, 12, 7, 6), (Conv(3), Conv(3, 3, dilation=2), Conv(12)), "identity"),
    "bottleneck, zero-pad": Case((2, 5, 6, 5), (Conv(3), Conv(3, 3, stride=2), Conv(12)), "zero_pad", stride=2),
    "bottleneck, no ReLU after the sum": replace(PROJECTED, act=IDENTITY),
    "bottleneck, external residual": replace(PROJECTED, projection=None, shortcut="residual"),
    "bottleneck, biased": PROJECTED.each(bias=True),
    "bottleneck, frozen statistics": PROJECTED.each(frozen=True),
    "bottleneck, frozen statistics, biased": STRIDED.each(frozen=True, bias=True),
    "bottleneck, last statistics frozen": replace(PROJECTED, layers=(Conv(3), Conv(3, 3), Conv(12, frozen=True))),
    "bottleneck, inner statistics frozen": replace(
        PROJECTED, layers=(Conv(3, frozen=True, bias=True), Conv(3, 3, frozen=True), Conv(12))
    ),
    "bottleneck, projection frozen": replace(PROJECTED, projection=Conv(12, frozen=True, bias=True)),
    "bottleneck, not affine": PROJECTED.each(affine=False),
    "bottleneck, not affine, frozen, biased": PROJECTED.each(affine=False, frozen=True, bias=True),
    "bottleneck, no running statistics": PROJECTED.each(running=False),
    "bottleneck, gamma = 0": PROJECTED.each(gamma="zero"),
    "bottleneck, last gamma and beta = 0": replace(
        BLOCK, layers=(Conv(3), Conv(3, 3), Conv(12, gamma="zero, and beta"))
    ),
    "basic block, all gamma and beta = 0": Case((2, 6, 6, 6), BASIC, "identity").each(gamma="zero, and beta"),
    "bottleneck, gamma < 0": PROJECTED.each(gamma="negative"),
    "bottleneck, gamma = 0 in one channel": PROJECTED.each(gamma="one channel zero"),
    "bottleneck, constant input": replace(PROJECTED, image="constant"),
    "bottleneck, constant input, identity": replace(BLOCK, image="constant"),
    "1x1 chain, constant input": Case((2, 4, 3, 3), (Conv(3), Conv(8)), projection=Conv(8), image="constant"),
    "one 3x3": Case((2, 5, 6, 7), (Conv(6, 3),)),
    "one 3x3, biased, strided": Case((2, 5, 7, 7), (Conv(6, 3, stride=2, bias=True),)),
    "one 3x3, no ReLU": Case((2, 5, 6, 7), (Conv(6, 3),), act=IDENTITY),
    "one 3x3, external residual": Case((2, 5, 6, 7), (Conv(6, 3),), "residual"),
    "one 3x3, external residual, no ReLU": Case((2, 5, 6, 7), (Conv(6, 3),), "residual", act=IDENTITY),
    "one 3x3, identity": Case((2, 6, 5, 5), (Conv(6, 3),), "identity"),
    "one 3x3, zero-pad": Case((2, 4, 5, 6), (Conv(6, 3, stride=2),), "zero_pad", stride=2),
    "one 7x7 on three channels": Case((2, 3, 13, 12), (Conv(6, 7, stride=2),)),
    "one 1x1": Case((2, 4, 5, 5), (Conv(12),)),
    "one 1x1, external residual": Case((2, 4, 5, 5), (Conv(12),), "residual"),
    "one 1x1, strided, no ReLU, external residual": Case((2, 4, 5, 6), (Conv(12, stride=2),), "residual", act=IDENTITY),
    "one 1x1, projection": Case((2, 4, 5, 6), (Conv(12, stride=2),), projection=Conv(12, stride=2)),
    "one depthwise": Case((2, 6, 5, 5), (Conv(6, 3, groups=6),)),
    "four layers": Case((2, 8, 5, 5), (Conv(4), Conv(4, 3), Conv(5, 3), Conv(8)), "identity"),
}
