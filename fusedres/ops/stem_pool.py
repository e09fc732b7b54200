"""The end of the stem: normalise, rectify and max-pool in one pass, and its way back."""

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from .bn_act import bn_act
from .bn_backward import masked
from .contract import OutputGrad, PoolGeometry, channels_last, check_activation, check_vector
from .op import Op

NO_GRADIENT = 255  # index of a window whose maximum the ReLU set to zero


def _stem_pool(
    y: Tensor, scale: Tensor, shift: Tensor, pool: PoolGeometry, *, compact: bool = True
) -> tuple[Tensor, Tensor]:
    """z = maxpool(relu(y * scale + shift)) and where each maximum stood in its window.

    Args:
        y: (N, C, H, W) raw convolution output.
        scale, shift: (C,) in the statistics dtype.
        pool: window of at most 255 pixels, its stride, its padding (with minus infinity).
        compact: one byte per index, the ReLU's mask in it; else the library's eight bytes and no mask.

    Returns:
        z (N, C, P, Q) and index (N, C, P, Q). Compact, it is uint8: tap r * S + s of the first maximum in window
        order, or 255 where the maximum is not positive, so that no gradient passes the ReLU. Else int64: h * W + w.
    """
    _check(y, scale, shift, pool)
    u, _ = bn_act(y, scale, shift)
    z, position = max_pool2d(u, *pool, return_indices=True)
    return z, _compacted(z, position, y.shape[3], pool) if compact else position


stem_pool = Op(_stem_pool)


@stem_pool.native
def _stem_pool_native(
    y: Tensor, scale: Tensor, shift: Tensor, pool: PoolGeometry, *, compact: bool = True
) -> tuple[Tensor, Tensor]:
    _check(y, scale, shift, pool)
    # The ReLU is monotonic, so it may follow the maximum, over a fraction of the pixels.
    u, _ = bn_act(y, scale, shift, act=None)
    z, position = max_pool2d(u, *pool, return_indices=True)
    z.relu_()
    return z, _compacted(z, position, y.shape[3], pool) if compact else position


def _compacted(z: Tensor, position: Tensor, width: int, pool: PoolGeometry) -> Tensor:
    return torch.where(z > 0, _tap(position, width, pool), NO_GRADIENT).to(torch.uint8)


def _check(y: Tensor, scale: Tensor, shift: Tensor, pool: PoolGeometry) -> None:
    check_activation("y", y)
    check_vector("scale", scale, y.shape[1])
    check_vector("shift", shift, y.shape[1])
    if pool.kernel[0] * pool.kernel[1] > NO_GRADIENT:
        raise ValueError(f"pool: expected a window of at most {NO_GRADIENT} pixels, got {pool.kernel}")


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
    """g = the sum of the gradients of every window whose maximum stood at a pixel, behind the ReLU.

    Args:
        dz: (N, C, P, Q); masked by z beside an index that is not compact.
        index: (N, C, P, Q) from `stem_pool`.
        size: (N, C, H, W) of y.
        pool: that of the forward pass.

    Returns:
        g (N, C, H, W) in the dtype of ``dz``: the gradient at y * scale + shift.
    """
    check_activation("dz", dz.g, size[1])
    arriving = masked(dz)
    if index.dtype == torch.uint8:
        arriving = torch.where(index == NO_GRADIENT, 0.0, arriving)
        index = _position(index, size[3], pool)
    # Only the shape and layout of this operand are read.
    like = torch.empty(size, dtype=arriving.dtype, device=arriving.device, memory_format=torch.channels_last)
    backward = torch.ops.aten.max_pool2d_with_indices_backward
    g: Tensor = backward(channels_last(arriving), like, *pool, (1, 1), False, index)
    return g


stem_pool_backward = Op(_stem_pool_backward)
