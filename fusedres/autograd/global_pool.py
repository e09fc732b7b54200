"""Global average pooling whose gradient is one value per image and channel, expanded and not written out."""

from typing import Any

import torch
from torch import Tensor


class GlobalPool(torch.autograd.Function):
    """z = mean of x over its pixels; the gradient at x is dz / (H W), expanded over the pixels.

    ``apply(x)``: x (N, C, H, W); z is (N, C, 1, 1).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.size = x.shape
        return x.mean((2, 3), keepdim=True)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor]:
        pixels = ctx.size[2] * ctx.size[3]
        return ((dz / pixels).expand(ctx.size),)
