"""The end of the stem: normalise, activate and max-pool in one pass, and its way back."""

import math

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from fusedres.activation import IDENTITY, RELU, Activation
from fusedres.operands import Geometry, Norm, OutputGrad, PoolGeometry, statistics_dtype
from fusedres.ops.act_mask import activated
from fusedres.ops.bn_act import bn_act
from fusedres.ops.bn_backward import masked_gradient
from fusedres.ops.bn_finalize import bn_from_running, eps_of, running_arguments
from fusedres.ops.checks import check_activation, check_vector
from fusedres.ops.contractions import bytes_in_windows
from fusedres.ops.device import device_activation
from fusedres.ops.op import Op
from fusedres.ops.rows import channels_last, empty_rows, launch_rows, storable

NO_GRADIENT = 255  # index of a window at whose maximum the activation is not open


def poolable(act: Activation, *, compact: bool = True) -> bool:
    """Whether `stem_pool` takes an activation; ``compact``: with indices of a byte."""
    return act.rises and not act.needs_input and (not compact or act.is_identity or act.closed == 0)


def _check(
    y: Tensor, scale: Tensor | None, shift: Tensor | None, pool: PoolGeometry, *, compact: bool = True,
    indices: bool = True, running: Norm | None = None, act: Activation = RELU,
) -> None:  # fmt: skip
    if not poolable(act, compact=compact and indices):
        raise ValueError(f"act: expected one that never falls and whose slope its output tells, got {act}")
    check_activation("y", y)
    if (scale is None) != (shift is None) or (scale is None) == (running is None):
        raise ValueError("scale, shift, running: expected scale and shift, or running alone")
    stored = () if running is None else zip(Norm._fields, running.vectors, strict=False)
    for name, vector in (("scale", scale), ("shift", shift), *stored):
        if vector is not None:
            check_vector(name, vector, y.shape[1])
    if pool.kernel[0] * pool.kernel[1] > NO_GRADIENT:
        raise ValueError(f"pool: expected a window of at most {NO_GRADIENT} pixels, got {pool.kernel}")


def _stem_pool(
    y: Tensor, scale: Tensor | None, shift: Tensor | None, pool: PoolGeometry, *, compact: bool = True,
    indices: bool = True, running: Norm | None = None, act: Activation = RELU,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """z = maxpool(act(y * scale + shift)) and where each maximum stood in its window.

    Args:
        y: (N, C, H, W) raw convolution output.
        scale, shift: (C,) in the statistics dtype, or both None, where ...
        running: ... a batch norm in evaluation stands in their place.
        pool: window of at most 255 pixels, its stride, its padding (with minus infinity).
        compact: one byte per index, the activation's mask in it; else the library's eight bytes and no mask.
        indices: whether to return them at all: inference needs none.
        act: one that never falls and whose output tells its slope; 0 where it is not open, if ``compact`` with indices.

    Returns:
        z (N, C, P, Q) and index (N, C, P, Q) or None. Compact, an index is uint8: tap r * S + s of the first maximum in
        window order, or 255 where the activation is not open there, so that no gradient passes it. Else int64:
        h * W + w.
    """
    u, _ = bn_act(y, *_numbers(y, scale, shift, running), act=act)
    if not indices:
        return max_pool2d(u, *pool), None
    z, position = max_pool2d(u, *pool, return_indices=True)
    return z, _compacted(z, position, y.shape[3], pool, act) if compact else position


stem_pool = Op(_stem_pool, check=_check)


@stem_pool.triton
def _stem_pool_triton(
    y: Tensor, scale: Tensor | None, shift: Tensor | None, pool: PoolGeometry, *, compact: bool = True,
    indices: bool = True, running: Norm | None = None, act: Activation = RELU,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    if not (storable(y) and (compact or not indices)):
        return NotImplemented
    from fusedres.kernels.stem_pool import stem_pool_kernel

    n, channels, h, w = y.shape
    size = (n, channels, *pool.output_size(h, w))
    z = empty_rows(y, size=size)
    index = empty_rows(y, torch.uint8, size) if indices else None
    numbers = {"scale_ptr": scale, "shift_ptr": shift, **running_arguments(running)}
    tensors = {"y_ptr": channels_last(y), **numbers, "z_ptr": z, "index_ptr": index, "eps": eps_of(running)}
    tensors["ACT"] = device_activation(act)
    covered = bytes_in_windows(y, size[2:], pool.kernel, Geometry(pool.stride, pool.padding))
    launch_rows(
        stem_pool_kernel, z, {**tensors, **_window(y, z, pool)}, reads=("y_ptr", *numbers),
        writes=("z_ptr", "index_ptr"), partial={"y_ptr": covered}, flops=4 * math.prod(pool.kernel) * z.numel(),
        kind="pooling", vectors=2, all_registers=True,
    )  # fmt: skip
    return z, index


def _window(full: Tensor, pooled: Tensor, pool: PoolGeometry) -> dict[str, int]:
    """The sizes and steps that both kernels are told."""
    sizes = {"H": full.shape[2], "W": full.shape[3], "P": pooled.shape[2], "Q": pooled.shape[3]}
    names = (("R", "S"), ("STRIDE_H", "STRIDE_W"), ("PAD_H", "PAD_W"))
    steps = {
        name: value for pair, values in zip(names, pool, strict=True) for name, value in zip(pair, values, strict=True)
    }
    return {**sizes, **steps}


@stem_pool.native
def _stem_pool_native(
    y: Tensor, scale: Tensor | None, shift: Tensor | None, pool: PoolGeometry, *, compact: bool = True,
    indices: bool = True, running: Norm | None = None, act: Activation = RELU,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    # The activation never falls, so it may follow the maximum, over a fraction of the pixels.
    u, _ = bn_act(y, *_numbers(y, scale, shift, running), act=IDENTITY)
    if not indices:
        return _activated(max_pool2d(u, *pool), act), None
    z, position = max_pool2d(u, *pool, return_indices=True)
    z = _activated(z, act)
    return z, _compacted(z, position, y.shape[3], pool, act) if compact else position


def _activated(pooled: Tensor, act: Activation) -> Tensor:
    return activated(pooled, act, pooled.dtype, bit_mask=False, scratch=True)[0]


def _compacted(z: Tensor, position: Tensor, width: int, pool: PoolGeometry, act: Activation) -> Tensor:
    assert act.is_open is not None
    return torch.where(act.is_open(z), _tap(position, width, pool), NO_GRADIENT).to(torch.uint8)


def _numbers(y: Tensor, scale: Tensor | None, shift: Tensor | None, running: Norm | None) -> tuple[Tensor, Tensor]:
    """Scale and shift."""
    if running is not None:
        norm = bn_from_running.reference(running, statistics_dtype(y.dtype))
        return norm.scale, norm.shift
    assert scale is not None and shift is not None
    return scale, shift


def _origin(like: Tensor, pool: PoolGeometry) -> tuple[Tensor, Tensor]:
    """Row (P, 1) and column (1, Q) where each window begins, in pixels of the unpadded input."""
    p, q = like.shape[2:]
    rows = torch.arange(p, device=like.device).unsqueeze(1) * pool.stride[0] - pool.padding[0]
    columns = torch.arange(q, device=like.device).unsqueeze(0) * pool.stride[1] - pool.padding[1]
    return rows, columns


def _tap(position: Tensor, width: int, pool: PoolGeometry) -> Tensor:
    """From a flat position h * W + w to the tap r * S + s inside its window."""
    rows, columns = _origin(position, pool)
    return (position // width - rows) * pool.kernel[1] + position % width - columns


def _position(index: Tensor, width: int, pool: PoolGeometry) -> Tensor:
    """From the tap inside its window to the flat position h * W + w; 0 where there is no gradient."""
    rows, columns = _origin(index, pool)
    tap = index.long()
    position = (rows + tap // pool.kernel[1]) * width + columns + tap % pool.kernel[1]
    return torch.where(index == NO_GRADIENT, 0, position)


def _stem_pool_backward(dz: OutputGrad, index: Tensor, size: tuple[int, ...], pool: PoolGeometry) -> Tensor:
    """g = the sum of the gradients of every window whose maximum stood at a pixel, behind the activation.

    Args:
        dz: (N, C, P, Q); masked by z beside an index that is not compact.
        index: (N, C, P, Q) from `stem_pool`.
        size: (N, C, H, W) of y.
        pool: that of the forward pass.

    Returns:
        g (N, C, H, W) in the dtype of ``dz``: the gradient at y * scale + shift.
    """
    check_activation("dz", dz.g, size[1])
    arriving = masked_gradient(dz)
    if index.dtype == torch.uint8:
        arriving = torch.where(index == NO_GRADIENT, 0.0, arriving)
        index = _position(index, size[3], pool)
    # Only the shape and layout of this operand are read.
    like = torch.empty(size, dtype=arriving.dtype, device=arriving.device, memory_format=torch.channels_last)
    backward = torch.ops.aten.max_pool2d_with_indices_backward
    g: Tensor = backward(channels_last(arriving), like, *pool, (1, 1), False, index)
    return g


stem_pool_backward = Op(_stem_pool_backward)


@stem_pool_backward.triton
def _stem_pool_backward_triton(dz: OutputGrad, index: Tensor, size: tuple[int, ...], pool: PoolGeometry) -> Tensor:
    check_activation("dz", dz.g, size[1])
    if index.dtype != torch.uint8 or dz.mask is not None or not storable(dz.g):
        return NotImplemented
    from fusedres.kernels.stem_pool import stem_pool_backward_kernel

    g = empty_rows(dz.g, size=size)
    tensors = {"dz_ptr": channels_last(dz.g), "index_ptr": channels_last(index), "g_ptr": g}
    windows = math.prod(-(-kernel // stride) for kernel, stride in zip(pool.kernel, pool.stride, strict=True))
    launch_rows(
        stem_pool_backward_kernel, g, {**tensors, **_window(g, dz.g, pool)}, reads=("dz_ptr", "index_ptr"),
        kind="pooling", writes=("g_ptr",), flops=windows * g.numel(), vectors=2,
    )  # fmt: skip
    return g
