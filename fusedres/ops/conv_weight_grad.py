"""The gradient of a convolution's weight, both operands formed on load."""

import torch
from torch import Tensor

from .bn_backward import bn_backward_apply
from .contract import ConvInput, Geometry, OutputGrad, check_activation, statistics_dtype
from .conv_forward import formed
from .op import Op


def weight_grad(dy: Tensor, u: Tensor, kernel: tuple[int, int], geometry: Geometry) -> Tensor:
    """The correlation of ``dy`` with ``u``, as the library computes it."""
    stride, padding, dilation, groups = geometry
    # Only the shape and layout of this operand are read.
    shape = (dy.shape[1], u.shape[1] // groups, *kernel)
    like = torch.empty(shape, dtype=u.dtype, device=u.device, memory_format=torch.channels_last)
    dw: Tensor = torch.ops.aten.convolution_backward(
        dy, u, like, None, stride, padding, dilation, False, (0, 0), groups, (False, True, False)
    )[1]
    return dw


def _conv_weight_grad(dy: OutputGrad, u: ConvInput, kernel: tuple[int, int], geometry: Geometry) -> Tensor:
    """dW[k, c, r, s] = sum over pixels of dy[k] * u[c] under tap (r, s).

    Args:
        dy: (N, K, P, Q), formed on load.
        u: (N, C, H, W), formed on load.
        kernel: (R, S).
        geometry: that of the forward convolution.

    Returns:
        dW (K, C/groups, R, S) in the statistics dtype.
    """
    check_activation("dy", dy.g)
    check_activation("u", u.tensor)
    dtype = statistics_dtype(u.tensor.dtype)
    return weight_grad(bn_backward_apply(dy).to(dtype), formed(u).to(dtype), kernel, geometry)


conv_weight_grad = Op(_conv_weight_grad)


@conv_weight_grad.native
def _conv_weight_grad_native(dy: OutputGrad, u: ConvInput, kernel: tuple[int, int], geometry: Geometry) -> Tensor:
    check_activation("dy", dy.g)
    check_activation("u", u.tensor)
    dw = weight_grad(bn_backward_apply(dy), formed(u), kernel, geometry)
    return dw.to(statistics_dtype(dw.dtype))
