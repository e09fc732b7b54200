"""The stem's weight gradient without its raw output: what is contracted while y is there, and what afterwards."""

import torch
from torch import Tensor

from fusedres.operands import ConvInput, Geometry, Normaliser, OutputGrad, PoolGeometry
from fusedres.ops.conv_weight_grad import Pooled, conv_weight_grad, summed_weight_grad
from fusedres.ops.moments_backward import (
    MomentsGrad,
    frozen_weight_grad,
    launch_moments_centre,
    moments_contraction,
    moments_weight_grad,
)
from fusedres.ops.op import Op
from fusedres.ops.rows import channels_last, pixels, storable
from fusedres.ops.stem_pool import stem_pool_backward


def _output_contraction(
    y: Tensor, mean: Tensor, u: ConvInput, kernel: tuple[int, int], geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """E = sum((y - mean) u^T) over the pixels, u^T the windows of the input, and the mean of these.

    Args:
        y: (N, K, P, Q) raw output.
        mean: (K,) of y.
        u: (N, C, H, W) input of the convolution.
        kernel: (R, S).
        geometry: of the convolution, of a single group.

    Returns:
        E (K, C, R, S) and the mean of the windows (C, R, S), in the statistics dtype.
    """
    one, zero = torch.ones_like(mean), torch.zeros_like(mean)
    centred = OutputGrad(y, None, y, p=zero, q=one, r=zero, mean=mean)
    product = conv_weight_grad(centred, u, kernel, geometry)
    everywhere = OutputGrad(torch.ones_like(y[:, :1]))
    return product, conv_weight_grad(everywhere, u, kernel, geometry)[0] / pixels(y)


output_contraction = Op(_output_contraction)


@output_contraction.triton
def _output_contraction_triton(
    y: Tensor, mean: Tensor, u: ConvInput, kernel: tuple[int, int], geometry: Geometry
) -> tuple[Tensor, Tensor]:
    launched = summed_weight_grad(OutputGrad(y), u, kernel, geometry, sum_dy=False, sum_u=True)
    if launched is None or launched.sum_u is None:
        return NotImplemented
    # Centred afterwards: the products of 16-bit numbers are exact, those of their differences would be rounded.
    centred = torch.addr(_rows(launched.dw), mean, _rows(launched.sum_u[None])[0], alpha=-1)
    return _windows(centred, kernel), launched.sum_u / pixels(y)


def _rows(windows: Tensor) -> Tensor:
    """(K, C, R, S), whose channels lie side by side, as a (K, R S C) view."""
    return windows.permute(0, 2, 3, 1).reshape(len(windows), -1)


def _windows(rows: Tensor, kernel: tuple[int, int]) -> Tensor:
    """The inverse of `_rows`."""
    return rows.view(len(rows), *kernel, -1).permute(0, 3, 1, 2)


def _pooled_contraction(
    dz: OutputGrad, index: Tensor, size: tuple[int, ...], pool: PoolGeometry, u: ConvInput, kernel: tuple[int, int],
    geometry: Geometry,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """D = sum(g u^T) and sum(g) of the gradient g that `stem_pool_backward` gives, which is not written.

    Args:
        dz, index, size, pool: as of `stem_pool_backward`.
        u, kernel, geometry: as of `moments_contraction`.

    Returns:
        D (K, C, R, S) and sum(g) (K,) in the statistics dtype.
    """
    g = OutputGrad(stem_pool_backward(dz, index, size, pool))
    d, sum_g = moments_contraction(g, u, kernel, geometry)
    return d.view(len(d), -1, *kernel), sum_g


pooled_contraction = Op(_pooled_contraction)


@pooled_contraction.triton
def _pooled_contraction_triton(
    dz: OutputGrad, index: Tensor, size: tuple[int, ...], pool: PoolGeometry, u: ConvInput, kernel: tuple[int, int],
    geometry: Geometry,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if index.dtype != torch.uint8 or dz.mask is not None:
        return NotImplemented
    launched = summed_weight_grad(dz, u, kernel, geometry, pooled=Pooled(index, pool, size))
    if launched is None or launched.sum_dy is None:
        return NotImplemented
    return launched.dw, launched.sum_dy


def _early_weight_grad(
    d: Tensor, sum_g: Tensor, count: int, product: Tensor | None, mean: Tensor | None, weight: Tensor,
    norm: Normaliser,
) -> MomentsGrad:  # fmt: skip
    """`moments_weight_grad` of a convolution of any window, W M being the product that `output_contraction` gave.

    Args:
        d: (K, C, R, S), sum_g: (K,), from `pooled_contraction`.
        count: pixels of the output.
        product, mean: from `output_contraction`; None under frozen statistics.
        weight: (K, C, R, S), the rounded one that the contraction used.
        norm: the `Normaliser` of the forward pass.

    Returns:
        `MomentsGrad` with dW (K, C, R, S).
    """
    w = weight.flatten(1).to(d.dtype)
    if product is None or mean is None:
        dweight, dgamma = frozen_weight_grad(d.flatten(1), sum_g, w, norm)
    else:
        flat = d.flatten(1), sum_g, count, mean.flatten(), product.flatten(1)
        dweight, dgamma, _ = moments_weight_grad(*flat, w, norm)
    return MomentsGrad(dweight.view(d.shape), dgamma, sum_g)


early_weight_grad = Op(_early_weight_grad)


@early_weight_grad.triton
def _early_weight_grad_triton(
    d: Tensor, sum_g: Tensor, count: int, product: Tensor | None, mean: Tensor | None, weight: Tensor,
    norm: Normaliser,
) -> MomentsGrad:  # fmt: skip
    if not storable(d, weight):
        return NotImplemented
    small, _ = launch_moments_centre(
        _rows(d).view(1, -1), sum_g.view(1, -1), count, None if mean is None else _rows(mean[None])[0],
        None if product is None else _rows(product), _rows(channels_last(weight)), norm,
    )  # fmt: skip
    return small._replace(dweight=_windows(small.dweight, (d.shape[2], d.shape[3])))
