"""The door of the fused chains: tensors are checked, a schedule is chosen, and training or inference runs."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import autocast
from .autocast import contraction_dtype, no_autocast
from .autograd import ConvChain, StemPool
from .autograd.spec import ChainSpec, ConvBN, LayerSpec, NormSpec, StemSpec
from .inference import infer_chain, infer_stem
from .launch import multiplies_in_tf32, target_of, wants_kernels
from .ops.bn_act import check_act
from .ops.contract import Geometry, PoolGeometry, check_activation, check_conv_shapes
from .ops.contractions import touched
from .ops.zero_pad_shortcut import zero_pad_size
from .plan import AUTO, Choice, announce, chain_schedule, choose, use_moments
from .plan.cost import ChainShape, ConvShape, StemShape
from .plan.gpus import Gpu, assumed_gpu, device_gpu, target_gpu
from .rounded import rounded


class Layer(NamedTuple):
    """One convolution and its batch norm: tensors, window, numbers, and what the result is multiplied by."""

    tensors: ConvBN
    geometry: Geometry
    norm: NormSpec
    gain: float = 1.0

    @property
    def gained(self) -> ConvBN:
        """The tensors with the gain in gamma and beta, as autograd sees it."""
        if self.gain == 1:
            return self.tensors
        weight, _, gamma, beta, *_ = self.tensors
        gamma = weight.new_full(weight.shape[:1], self.gain) if gamma is None else gamma * self.gain
        return self.tensors._replace(gamma=gamma, beta=None if beta is None else beta * self.gain)


Size = tuple[int, ...]


def run_chain(
    x: Tensor,
    layers: Sequence[Layer],
    *,
    projection: Layer | None = None,
    shortcut: str = "none",
    residual: Tensor | None = None,
    zero_pad_stride: tuple[int, int] = (1, 1),
    act: str | None = "relu",
    schedule: str = AUTO,
    hands_over: bool = False,
) -> Tensor:
    """act(bn(conv(... relu(bn(conv(x))) ...)) + shortcut), fused, differentiable.

    Args:
        x: (N, C, H, W), any memory format (channels_last is fastest).
        layers: the chain in order.
        projection: the conv-BN of a projection shortcut.
        shortcut: ``"none"``, ``"identity"``, ``"projection"``, ``"zero_pad"`` or ``"residual"``.
        residual: (N, K, P, Q), with ``shortcut="residual"``.
        zero_pad_stride: of the zero-pad shortcut.
        act: ``"relu"`` or None.
        schedule: ``"auto"`` or a rung of the ladder.
        hands_over: whether the result goes to another fused chain and nobody else.

    Returns:
        (N, K, P, Q), channels_last.

    Raises:
        ValueError, TypeError: naming the argument, before any running statistic or counter has changed.
    """
    check_activation("x", x)
    check_act(act)
    # Kernels read memory, and know nothing of a sign that is applied later.
    x, residual = x.resolve_neg(), None if residual is None else residual.resolve_neg()
    dtype = contraction_dtype(x)
    size = checked_size("x", x, layers[0], tuple(x.shape), dtype)
    for i, layer in enumerate(layers[1:], start=2):
        size = checked_size(f"layer {i}", x, layer, size, dtype)
    if projection is not None:
        check_joins("projection", checked_size("projection", x, projection, tuple(x.shape), dtype), size)
    elif shortcut == "identity":
        check_joins("x", tuple(x.shape), size)
    elif shortcut == "zero_pad":
        check_joins("shortcut", zero_pad_size(tuple(x.shape), size[1], zero_pad_stride), size)
    elif residual is not None:
        check_activation("residual", residual, device=x.device)
        check_joins("residual", tuple(residual.shape), size)

    every = [*layers, projection] if projection is not None else list(layers)
    if not is_differentiated(x, residual, every) and not any(layer.norm.batch_stats for layer in every):
        with no_autocast(x.device.type):
            return infer_chain(x, dtype, layers, projection, shortcut, residual, zero_pad_stride, act)

    kernels = wants_kernels(x) and dtype != torch.float64  # in which there are none
    if schedule == AUTO and kernels:
        windows = tuple((layer.tensors.weight.shape, layer.geometry) for layer in every)
        choice = _chain_choice(x.shape, windows, len(layers), shortcut, dtype, _gpu(x), multiplies_in_tf32(x))
        announce(choice)
        schedule = choice.schedule.name

    last = len(layers) - 1
    moments = [
        i >= last and use_moments(schedule, layer.tensors.weight, layer.geometry, dtype, kernels=kernels)
        for i, layer in enumerate(every)
    ]
    specs = layer_specs(every, dtype, moments)
    spec = ChainSpec(
        layers=specs[: len(layers)],
        schedule=chain_schedule(schedule, kernels=kernels),
        dtype=dtype,
        projection=None if projection is None else specs[-1],
        shortcut=shortcut,
        act=act,
        zero_pad_stride=zero_pad_stride,
        hands_over=hands_over,
    )
    tensors = [tensor for layer in every for tensor in layer.gained]
    z: Tensor = ConvChain.apply(x, residual, spec, *tensors)
    return z


def run_stem(x: Tensor, layer: Layer, pool: PoolGeometry, *, schedule: str = AUTO) -> Tensor:
    """maxpool(relu(bn(conv(x)))), fused, differentiable.

    Args:
        x: (N, C, H, W).
        layer: the convolution and its batch norm.
        pool: the max-pooling window.
        schedule: as in `run_chain`.

    Returns:
        (N, K, P, Q), channels_last.

    Raises:
        ValueError, TypeError: naming the argument, before any running statistic or counter has changed.
    """
    check_activation("x", x)
    x = x.resolve_neg()
    dtype = contraction_dtype(x)
    _, _, height, width = checked_size("x", x, layer, tuple(x.shape), dtype)
    if min(pool.output_size(height, width)) < 1:
        raise ValueError(f"pool: {height} x {width} pixels are too few for {pool}")
    if not is_differentiated(x, None, [layer]) and not layer.norm.batch_stats:
        with no_autocast(x.device.type):
            return infer_stem(x, layer, pool, dtype)
    kernels = wants_kernels(x) and dtype != torch.float64  # in which there are none
    if schedule == AUTO and kernels:
        window = (layer.tensors.weight.shape, layer.geometry)
        choice = _stem_choice(x.shape, window, pool, x.requires_grad, dtype, _gpu(x), multiplies_in_tf32(x))
        announce(choice)
        schedule = choice.schedule.name
    chosen = chain_schedule(schedule, kernels=kernels)
    (layer_spec,) = layer_specs([layer], dtype)
    spec = StemSpec(layer_spec, pool, chosen, dtype)
    z: Tensor = StemPool.apply(x, spec, *layer.tensors)
    return z


def layer_specs(
    layers: Sequence[Layer], dtype: torch.dtype, moments: Sequence[bool] | None = None
) -> tuple[LayerSpec, ...]:
    """What a Function is told of layers, their weights in the dtype of the contractions included."""
    weights = [layer.tensors.weight for layer in layers]
    copies = rounded(weights, dtype)
    return tuple(
        LayerSpec(layer.geometry, layer.norm, in_moments, None if copy is weight else copy)
        for layer, weight, copy, in_moments in zip(
            layers, weights, copies, moments or [False] * len(layers), strict=True
        )
    )


Window = tuple[Size, Geometry]  # shape of the weight, and how it moves


def _gpu(x: Tensor) -> Gpu:
    """The GPU that runs kernels on ``x``, or is thought to."""
    if x.is_cuda:
        return device_gpu(x.get_device())
    return assumed_gpu() or target_gpu(target_of(x))


@functools.lru_cache(maxsize=4096)
def _chain_choice(
    size: Size, windows: tuple[Window, ...], depth: int, shortcut: str, dtype: torch.dtype, gpu: Gpu, tf32: bool
) -> Choice:
    """The choice for a chain of ``depth`` layers; a projection's window comes behind theirs."""
    shapes, inner = [], size
    for weight, geometry in windows[:depth]:
        shape, inner = _conv_shape(inner, weight, geometry)
        shapes.append(shape)
    projection = _conv_shape(size, *windows[depth])[0] if len(windows) > depth else None
    return choose(ChainShape(tuple(shapes), projection, shortcut), dtype, gpu, tf32=tf32)


@functools.lru_cache(maxsize=256)
def _stem_choice(
    size: Size, window: Window, pool: PoolGeometry, images_grad: bool, dtype: torch.dtype, gpu: Gpu, tf32: bool
) -> Choice:
    shape, (n, _, p, q) = _conv_shape(size, *window)
    return choose(StemShape(shape, n * math.prod(pool.output_size(p, q)), images_grad), dtype, gpu, tf32=tf32)


def _conv_shape(size: Size, weight: Size, geometry: Geometry) -> tuple[ConvShape, Size]:
    """What the choice depends on, and the (N, K, P, Q) of the output."""
    n, c, h, w = size
    k, _, *kernel = weight
    p, q = geometry.output_size(h, w, (kernel[0], kernel[1]))
    read = n
    for side, windows, taps, *step in zip((h, w), (p, q), kernel, *geometry[:3], strict=True):
        read *= touched(side, windows, taps, *step)
    shape = ConvShape(
        read, n * h * w, n * p * q, c, k, geometry.groups, (kernel[0], kernel[1]), geometry.padding != (0, 0)
    )
    return shape, (n, k, p, q)


def is_differentiated(
    x: Tensor, residual: Tensor | None, layers: Sequence[Layer], others: Sequence[Tensor | None] = ()
) -> bool:
    """Whether autograd follows a call on these tensors."""
    if not torch.is_grad_enabled():
        return False
    tensors = [x, residual, *(tensor for layer in layers for tensor in layer.tensors), *others]
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def checked_size(name: str, x: Tensor, layer: Layer, size: Size, dtype: torch.dtype) -> Size:
    """The (N, K, P, Q) that a layer makes of an input of ``size``; refuses what eager PyTorch would refuse."""
    weight = layer.tensors.weight
    n = size[0]
    p, q = check_conv_shapes(name, size, weight, layer.geometry)
    if weight.device != x.device:
        raise ValueError(f"weight of {name}: expected it on {x.device}, got {weight.device}")
    if weight.dtype != dtype and not autocast.enabled(x.device.type):
        raise TypeError(f"weight of {name}: expected the dtype of x, {dtype}, got {weight.dtype}")
    check_norm(name, layer.norm, n * p * q)
    return n, weight.shape[0], p, q


def check_norm(name: str, norm: NormSpec, values: int) -> None:
    """Refuse numbers that batch norm can not use, and statistics over a single value per channel."""
    if not _is_finite("momentum", name, norm.momentum):
        raise ValueError(f"momentum of {name}: expected a finite number, got {norm.momentum}")
    if not _is_finite("eps", name, norm.eps) or norm.eps < 0:
        raise ValueError(f"eps of {name}: expected a finite number of at least 0, got {norm.eps}")
    if norm.batch_stats and values < 2:
        raise ValueError(f"{name}: expected more than 1 value per channel when training, got {values}")


def _is_finite(what: str, name: str, value: float) -> bool:
    try:
        return math.isfinite(value)
    except TypeError as error:
        raise TypeError(f"{what} of {name}: expected a number, got {value!r}") from error


def check_joins(name: str, size: Size, expected: Size) -> None:
    """Refuse a branch of another shape than the chain's output."""
    if size != expected:
        raise ValueError(f"{name}: expected shape {expected} to join the chain's output, got {size}")
