"""Ops with the shapes of ResNet-50, each beside the separate library calls of eager PyTorch that do the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fusedres.bench import cudnn
from fusedres.bench.cases import OpCase, near
from fusedres.bench.eager import normalised
from fusedres.operands import ConvInput, Geometry, Norm, Normaliser, NormNumbers, OutputGrad, PoolGeometry
from fusedres.ops.act_mask import pack_relu_mask
from fusedres.ops.add_act import add_act
from fusedres.ops.bn_act import bn_act
from fusedres.ops.bn_backward import bn_backward
from fusedres.ops.bn_finalize import bn_finalize
from fusedres.ops.bn_statistics import bn_statistics
from fusedres.ops.conv_bn_act import Contraction, conv_bn_act
from fusedres.ops.conv_forward import conv_forward
from fusedres.ops.conv_input_grad import conv_input_grad
from fusedres.ops.conv_weight_grad import conv_weight_grad
from fusedres.ops.input_moments import input_moments
from fusedres.ops.rows import as_rows
from fusedres.ops.stem_pool import NO_GRADIENT, stem_pool, stem_pool_backward

__all__ = ["OPS", "op"]

EPS = 1e-5
BATCH = 64
# (width, pixels) of ResNet-50's stages.
STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))
SAME, POINT, POOL = Geometry(padding=(1, 1)), Geometry(), PoolGeometry()


def _activation(n: int, c: int, px: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    drawn = torch.randn((n, c, px, px), generator=generator)
    return drawn.to(dtype).contiguous(memory_format=torch.channels_last)


def _weight(k: int, c: int, side: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    drawn = torch.randn((k, c, side, side), generator=generator) / (c * side * side) ** 0.5
    return drawn.to(dtype).contiguous(memory_format=torch.channels_last)


def _numbers(channels: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A scale and a shift, fp32."""
    return torch.rand(channels, generator=generator) + 0.5, torch.randn(channels, generator=generator)


def _statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, invstd) by the library's own reduction where it has one alone."""
    if y.is_cuda:
        mean, invstd = torch.batch_norm_stats(y, EPS)
        return mean, invstd
    wide = y if y.dtype == torch.float64 else y.float()
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    return mean, torch.rsqrt(var + EPS)


# Each op below: how its operands are drawn, what eager PyTorch calls, what we call.


def _conv_operands(width: int, n: int, px: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    y = _activation(n, width, px, dtype, generator)
    return y, *_numbers(width, generator), _weight(width, width, 3, dtype, generator)


def _conv_plain(y: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    out = F.conv2d(F.relu(normalised(y, scale, shift)), weight, padding=1)
    return out, *_statistics(out)


def _conv_fused(y: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    out, partials = conv_forward(ConvInput(y, scale, shift), weight, SAME, statistics=True)
    assert partials is not None
    norm = bn_finalize(partials, Norm(numbers=NormNumbers(EPS)))
    return out, norm.mean, norm.invstd


def _end_operands(width: int, n: int, px: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    y, residual = _activation(n, width, px, dtype, generator), _activation(n, 4 * width, px, dtype, generator)
    weight = _weight(4 * width, width, 1, dtype, generator)
    return y, *_numbers(width, generator), weight, *_numbers(4 * width, generator), residual


def _end_plain(
    y: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, out_scale: Tensor, out_shift: Tensor, residual: Tensor
) -> Tensor:
    out = F.conv2d(F.relu(normalised(y, scale, shift)), weight)
    return F.relu(normalised(out, out_scale, out_shift) + residual)


def _end_fused(
    y: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, out_scale: Tensor, out_shift: Tensor, residual: Tensor
) -> Tensor:
    branch = Contraction(ConvInput(y, scale, shift), weight, POINT, out_scale, out_shift)
    return conv_bn_act(branch, residual=residual, bit_mask=True).z


def _inference_operands(width: int, n: int, px: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    x, residual = (_activation(n, width, px, dtype, generator) for _ in range(2))
    return x, _weight(width, width, 3, dtype, generator), *_numbers(width, generator), residual


def _inference_plain(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor) -> Tensor:
    return F.relu(normalised(F.conv2d(x, weight, padding=1), scale, shift) + residual)


def _inference_fused(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor) -> Tensor:
    return conv_bn_act(Contraction(ConvInput(x), weight, SAME, scale, shift), residual=residual).z


def _act_operands(width: int, n: int, px: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    y, residual = (_activation(n, 4 * width, px, dtype, generator) for _ in range(2))
    return y, *_numbers(4 * width, generator), residual


def _act_plain(y: Tensor, scale: Tensor, shift: Tensor, residual: Tensor) -> Tensor:
    return F.relu(normalised(y, scale, shift) + residual)


def _act_fused(y: Tensor, scale: Tensor, shift: Tensor, residual: Tensor) -> Tensor:
    return bn_act(y, scale, shift, residual=residual, bit_mask=True)[0]


def _sum_operands(width: int, n: int, px: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    return tuple(_activation(n, 4 * width, px, dtype, generator) for _ in range(2))


def _statistics_fused(y: Tensor) -> tuple[Tensor, Tensor]:
    norm = bn_finalize(bn_statistics(y), Norm(numbers=NormNumbers(EPS)))
    return norm.mean, norm.invstd


def _backward_operands(width: int, n: int, px: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    channels = 4 * width
    g, y, z = (_activation(n, channels, px, dtype, generator) for _ in range(3))
    var, mean = torch.var_mean(y.float(), (0, 2, 3), correction=0)
    gamma = torch.rand(channels, generator=generator) + 0.5
    return g, pack_relu_mask(z.relu()), F.relu(z), y, gamma, mean, torch.rsqrt(var + EPS)


def _backward_plain(
    g: Tensor, _mask: Tensor, z: Tensor, y: Tensor, gamma: Tensor, mean: Tensor, invstd: Tensor
) -> tuple[Tensor, ...]:
    g = torch.ops.aten.threshold_backward(g, z, 0.0)
    outputs = torch.ops.aten.native_batch_norm_backward(
        g, y, gamma, None, None, mean, invstd, True, EPS, [True, True, True]
    )
    return tuple(outputs)


def _backward_fused(
    g: Tensor, mask: Tensor, _z: Tensor, y: Tensor, gamma: Tensor, mean: Tensor, invstd: Tensor
) -> tuple[Tensor, ...]:
    scale = gamma * invstd
    norm = Normaliser(mean, invstd, scale, -mean * scale)
    return bn_backward(OutputGrad(g, mask), y, norm, gamma, batch_stats=True)


def _gradient_operands(width: int, n: int, px: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    dy, y = (_activation(n, width, px, dtype, generator) for _ in range(2))
    return dy, y, *_numbers(width, generator), _weight(width, width, 3, dtype, generator)


def _convolution_backward(dy: Tensor, u: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Any, ...]:
    one = (1, 1)
    outputs = torch.ops.aten.convolution_backward(dy, u, weight, None, one, one, one, False, (0, 0), 1, mask)
    return tuple(outputs)


def _weight_grad_plain(dy: Tensor, y: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
    u = F.relu(normalised(y, scale, shift))
    dw: Tensor = _convolution_backward(dy, u, weight, [False, True, False])[1]
    return dw


def _weight_grad_fused(dy: Tensor, y: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
    return conv_weight_grad(OutputGrad(dy), ConvInput(y, scale, shift), (3, 3), SAME)


def _input_grad_operands(
    width: int, n: int, px: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Any, ...]:
    dy, x, shortcut = (_activation(n, width, px, dtype, generator) for _ in range(3))
    z = _activation(n, width, px, dtype, generator).relu()
    return dy, x, _weight(width, width, 3, dtype, generator), shortcut, pack_relu_mask(z), z


def _input_grad_plain(dy: Tensor, x: Tensor, weight: Tensor, shortcut: Tensor, _mask: Tensor, z: Tensor) -> Tensor:
    du = _convolution_backward(dy, x, weight, [True, False, False])[0]
    total: Tensor = du + torch.ops.aten.threshold_backward(shortcut, z, 0.0)
    return total


def _input_grad_fused(dy: Tensor, x: Tensor, weight: Tensor, shortcut: Tensor, mask: Tensor, _z: Tensor) -> Tensor:
    return conv_input_grad(OutputGrad(dy), weight, tuple(x.shape), SAME, add=OutputGrad(shortcut, mask))


def _moments_operands(width: int, n: int, px: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    return _activation(n, width, px, dtype, generator), *_numbers(width, generator)


def _moments_plain(y: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    rows = as_rows(F.relu(normalised(y, scale, shift)))
    mean, gram = rows.mean(0), rows.t() @ rows
    return mean, gram - len(rows) * torch.outer(mean, mean)


def _moments_fused(y: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    moments = input_moments(ConvInput(y, scale, shift))
    return moments.mean, moments.m2


def _stem_operands(width: int, n: int, px: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    return _activation(n, width, px, dtype, generator), *_numbers(width, generator)


def _stem_plain(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(normalised(y, scale, shift)), *POOL, return_indices=True)[0]


def _stem_fused(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return stem_pool(y, scale, shift, POOL)[0]


def _unpool_operands(width: int, n: int, px: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    u = _activation(n, width, px, dtype, generator).relu()
    z, position = F.max_pool2d(u, *POOL, return_indices=True)
    _, index = stem_pool.reference(u, torch.ones(width), torch.zeros(width), POOL)
    assert index is not None and bool(((index == NO_GRADIENT) == (z <= 0)).all())
    dz = _activation(n, width, z.shape[2], dtype, generator)
    return dz, index, position.contiguous(memory_format=torch.channels_last), u


def _unpool_plain(dz: Tensor, _index: Tensor, position: Tensor, u: Tensor) -> Tensor:
    du = torch.ops.aten.max_pool2d_with_indices_backward(dz, u, *POOL, (1, 1), False, position)
    g: Tensor = torch.ops.aten.threshold_backward(du, u, 0.0)
    return g


def _unpool_fused(dz: Tensor, index: Tensor, _position: Tensor, u: Tensor) -> Tensor:
    return stem_pool_backward(OutputGrad(dz), index, tuple(u.shape), POOL)


Operands = Callable[[int, int, int, torch.dtype, torch.Generator], tuple[Any, ...]]

# Name: operands, eager PyTorch, ours, cuDNN's graph if it has one.
_STAGED: dict[str, tuple[Operands, Callable[..., Any], Callable[..., Any], Callable[..., Any] | None]] = {
    "conv3x3_prologue_stats": (_conv_operands, _conv_plain, _conv_fused, cudnn.prologue_conv_stats),
    "conv3x3_bn_add_relu": (_inference_operands, _inference_plain, _inference_fused, cudnn.conv_scale_add_relu),
    "block_end": (_end_operands, _end_plain, _end_fused, None),
    "bn_add_relu": (_act_operands, _act_plain, _act_fused, None),
    "add_relu": (_sum_operands, lambda x, y: F.relu(x + y), lambda x, y: add_act(x, y, bit_mask=True)[0], None),
    "bn_statistics": (lambda *drawn: _sum_operands(*drawn)[:1], _statistics, _statistics_fused, None),
    "bn_relu_backward": (_backward_operands, _backward_plain, _backward_fused, None),
    "conv3x3_weight_grad": (_gradient_operands, _weight_grad_plain, _weight_grad_fused, None),
    "conv3x3_input_grad": (_input_grad_operands, _input_grad_plain, _input_grad_fused, None),
    "input_moments": (_moments_operands, _moments_plain, _moments_fused, None),
}

OPS = {
    f"{name}.stage{stage}": OpCase(f"{name}.stage{stage}", partial(operands, width), plain, fused, px, BATCH, graph)
    for name, (operands, plain, fused, graph) in _STAGED.items()
    for stage, (width, px) in enumerate(STAGES, start=1)
} | {
    "stem_pool": OpCase("stem_pool", partial(_stem_operands, 64), _stem_plain, _stem_fused, 112, BATCH),
    "stem_pool_backward": OpCase(
        "stem_pool_backward", partial(_unpool_operands, 64), _unpool_plain, _unpool_fused, 112, BATCH
    ),
}


def op(name: str) -> OpCase:
    """One of `OPS`.

    Raises:
        ValueError: there is none; near names are listed.
    """
    if name not in OPS:
        raise ValueError(near("op", name, OPS))
    return OPS[name]
