"""Both gradients of a convolution whose output gradient serves them at once."""

import torch
from torch import Tensor

from .bn_backward import bn_backward_apply
from .contract import ConvInput, Geometry, OutputGrad, check_activation, statistics_dtype
from .conv_forward import formed
from .conv_input_grad import conv_input_grad, joined, joined_by_onednn
from .conv_weight_grad import conv_weight_grad
from .op import Op
from .zero_pad_shortcut import Added


def _conv_backward(
    dy: OutputGrad, u: ConvInput, weight: Tensor, geometry: Geometry, *, add: Added | None = None
) -> tuple[Tensor, Tensor]:
    """(dW, du): `conv_weight_grad` and `conv_input_grad`.

    Args:
        dy: (N, K, P, Q), formed on load.
        u: (N, C, H, W), formed on load.
        weight: (K, C/groups, R, S) in the dtype of u.
        geometry: that of the forward convolution.
        add: a gradient of the same input from elsewhere (the shortcut), masked on load, or None.

    Returns:
        dW (K, C/groups, R, S) in the statistics dtype, and du (N, C, H, W) as `conv_input_grad` gives it.
    """
    kernel = (weight.shape[2], weight.shape[3])
    dweight = conv_weight_grad(dy, u, kernel, geometry)
    return dweight, conv_input_grad(dy, weight, tuple(u.tensor.shape), geometry, add=add)


conv_backward = Op(_conv_backward)


@conv_backward.triton
def _conv_backward_triton(
    dy: OutputGrad, u: ConvInput, weight: Tensor, geometry: Geometry, *, add: Added | None = None
) -> tuple[Tensor, Tensor]:
    if dy.p is None and dy.mask is None and u.scale is None and add is None:
        return NotImplemented  # nothing to join: both in one call, where a library has one
    return _conv_backward(dy, u, weight, geometry, add=add)


@conv_backward.native
def _conv_backward_native(
    dy: OutputGrad, u: ConvInput, weight: Tensor, geometry: Geometry, *, add: Added | None = None
) -> tuple[Tensor, Tensor]:
    if isinstance(add, OutputGrad) and joined_by_onednn(weight, geometry, add):
        return NotImplemented
    check_activation("dy", dy.g, weight.shape[0])
    check_activation("u", u.tensor)
    stride, padding, dilation, groups = geometry
    du, dweight, _ = torch.ops.aten.convolution_backward(
        bn_backward_apply(dy), formed(u), weight, None, stride, padding, dilation, False, (0, 0), groups,
        (True, True, False),
    )  # fmt: skip
    return dweight.to(statistics_dtype(dweight.dtype)), joined(du, add)
