"""What stands for a convolution's raw output in its weight's gradient, made while the output is there."""

from typing import NamedTuple

import torch
from torch import Tensor

from .contract import ConvInput, Geometry, OutputGrad, check_activation, pixels, statistics_dtype
from .conv_forward import formed
from .conv_weight_grad import summed_weight_grad, weight_grad
from .op import Op


class CentredProduct(NamedTuple):
    """``product`` (K, C R S) and ``mean`` (C R S,), of `centred_product`."""

    product: Tensor
    mean: Tensor


def _centred_product(y: Tensor, u: ConvInput, kernel: tuple[int, int], geometry: Geometry) -> CentredProduct:
    """E = sum((y - mean(y)) u^T) over the pixels, u^T the window of C R S values under each, and the mean of windows.

    Args:
        y: (N, K, P, Q) raw output of a convolution of one group.
        u: (N, C, H, W) its input, formed on load.
        kernel: (R, S).
        geometry: of the convolution.

    Returns:
        `CentredProduct` in the statistics dtype.
    """
    check_activation("y", y)
    check_activation("u", u.tensor)
    dtype = statistics_dtype(u.tensor.dtype)
    wide, source = y.to(dtype), formed(u).to(dtype)
    product = weight_grad(wide - wide.mean((0, 2, 3), keepdim=True), source, kernel, geometry)
    sums = weight_grad(torch.ones_like(wide[:, :1]), source, kernel, geometry)
    return CentredProduct(product.flatten(1), sums.flatten() / pixels(y))


centred_product = Op(_centred_product)


@centred_product.triton
def _centred_product_triton(y: Tensor, u: ConvInput, kernel: tuple[int, int], geometry: Geometry) -> CentredProduct:
    check_activation("y", y)
    check_activation("u", u.tensor)
    launched = summed_weight_grad(OutputGrad(y), u, kernel, geometry, sum_u=True)
    if launched is None or launched.sum_dy is None or launched.sum_u is None:
        return NotImplemented
    mean = launched.sum_u.flatten() / pixels(y)
    return CentredProduct(torch.addr(launched.dw.flatten(1), launched.sum_dy, mean, alpha=-1), mean)
