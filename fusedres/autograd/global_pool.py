"""Global average pooling whose gradient is never spread out in memory."""

from typing import Any

import torch
from torch import Tensor


class GlobalPool(torch.autograd.Function):
    """z = mean of x over its pixels, (N, C, 1, 1).

    ``apply(x)``: x (N, C, H, W). Its gradient is dz / (H * W), expanded: a value per image and channel in memory,
    which kernels read as such. Differentiable as often as you like.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.size = x.shape
        return x.mean((2, 3), keepdim=True)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> Tensor:
        pixels = ctx.size[2] * ctx.size[3]
        return (dz / pixels).expand(ctx.size)
