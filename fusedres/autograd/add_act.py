"""The end of a block without a batch norm: add the shortcut, rectify."""

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..autocast import no_autocast
from ..ops.add_act import add_act
from ..ops.bn_backward import masked
from ..ops.contract import OutputGrad, channels_last
from ..replay import replayed
from .composed import Composed, joining
from .saved import fused_or_composed


class AddAct(torch.autograd.Function):
    """z = act(x + residual).

    ``apply(x, residual, act)``: x and residual (N, C, H, W). Only the ReLU's bit mask is kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, act: str | None) -> Tensor:
        training = any(ctx.needs_input_grad)
        with no_autocast(x.device.type):
            z, mask = replayed(_forward, x, residual, act, training)
        if training:
            ctx.backend, ctx.dtypes = backends.current(), (x.dtype, residual.dtype)
            ctx.save_for_backward(mask)
        return z

    @staticmethod
    @fused_or_composed
    def backward(ctx: Any, dz: Tensor) -> tuple[Any, ...]:
        g = replayed(_backward, dz, ctx.saved_tensors)
        dx, dresidual = (
            g.to(dtype) if needed else None for dtype, needed in zip(ctx.dtypes, ctx.needs_input_grad, strict=False)
        )
        return dx, dresidual, None

    @staticmethod
    def composed(ctx: Any, dz: Tensor) -> Composed:
        inputs = (joining(dz, dtype) for dtype in ctx.dtypes)
        return Composed((*inputs, None), lambda x, residual, _: x + residual, *ctx.saved_tensors)


def _forward(x: Tensor, residual: Tensor, act: str | None, training: bool) -> tuple[Tensor, Tensor | None]:
    """z and its mask."""
    return add_act(channels_last(x), channels_last(residual), act=act, bit_mask=training and act == "relu")


def _backward(dz: Tensor, mask: tuple[Tensor | None]) -> Tensor:
    """The gradient behind the ReLU."""
    return masked(OutputGrad(channels_last(dz), *mask))
