"""The stem's weight gradient without its raw output: what is contracted while y is there, and what afterwards."""

import torch
from torch import Tensor

from .contract import ConvInput, Geometry, OutputGrad, PoolGeometry, pixels
from .conv_weight_grad import Pooled, conv_weight_grad, summed_weight_grad
from .moments_backward import moments_contraction
from .op import Op
from .stem_pool import stem_pool_backward


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
        E (K, C R S) and the mean of the windows (C R S,), in the statistics dtype.
    """
    one, zero = torch.ones_like(mean), torch.zeros_like(mean)
    centred = OutputGrad(y, None, y, p=zero, q=one, r=zero, mean=mean)
    product = conv_weight_grad(centred, u, kernel, geometry).flatten(1)
    everywhere = OutputGrad(torch.ones_like(y[:, :1]))
    return product, conv_weight_grad(everywhere, u, kernel, geometry).flatten() / pixels(y)


output_contraction = Op(_output_contraction)


@output_contraction.triton
def _output_contraction_triton(
    y: Tensor, mean: Tensor, u: ConvInput, kernel: tuple[int, int], geometry: Geometry
) -> tuple[Tensor, Tensor]:
    launched = summed_weight_grad(OutputGrad(y), u, kernel, geometry, sum_dy=False, sum_u=True)
    if launched is None or launched.sum_u is None:
        return NotImplemented
    # Centred afterwards: the products of 16-bit numbers are exact, those of their differences would be rounded.
    total = launched.sum_u.flatten()
    return torch.addr(launched.dw.flatten(1), mean, total, alpha=-1), total / pixels(y)


def _pooled_contraction(
    dz: OutputGrad, index: Tensor, size: tuple[int, ...], pool: PoolGeometry, u: ConvInput, kernel: tuple[int, int],
    geometry: Geometry,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """D = sum(g u^T) and sum(g) of the gradient g that `stem_pool_backward` gives, which is not written.

    Args:
        dz, index, size, pool: as of `stem_pool_backward`.
        u, kernel, geometry: as of `moments_contraction`.

    Returns:
        As `moments_contraction`.
    """
    return moments_contraction(OutputGrad(stem_pool_backward(dz, index, size, pool)), u, kernel, geometry)


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
    return launched.dw.flatten(1), launched.sum_dy
