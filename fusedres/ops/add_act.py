"""Add and rectify: the end of a residual block whose branches need no normalisation here."""

import torch
from torch import Tensor

from .bn_act import check_act, launch_bn_act
from .contract import check_activation, statistics_dtype
from .op import Op
from .relu_mask import pack_relu_mask
from .rows import empty_rows, storable


def _check(x: Tensor, residual: Tensor, act: str | None) -> None:
    check_activation("x", x)
    check_activation("residual", residual)
    if residual.shape != x.shape:
        raise ValueError(f"residual: expected the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}")
    check_act(act)


def _add_act(
    x: Tensor, residual: Tensor, *, act: str | None = "relu", bit_mask: bool = False
) -> tuple[Tensor, Tensor | None]:
    """z = act(x + residual).

    Args:
        x: (N, C, H, W).
        residual: (N, C, H, W).
        act: ``"relu"`` or None.
        bit_mask: whether to return the ReLU's open positions too.

    Returns:
        z (N, C, H, W), rounded once to the wider dtype of the two, and the bit mask (`pack_relu_mask`) or None.
    """
    _check(x, residual, act)
    dtype = torch.promote_types(x.dtype, residual.dtype)
    z = x.to(statistics_dtype(dtype)) + residual.to(statistics_dtype(dtype))
    z = (torch.relu(z) if act == "relu" else z).to(dtype)
    return z, pack_relu_mask(z) if bit_mask else None


add_act = Op(_add_act)


@add_act.triton
def _add_act_triton(
    x: Tensor, residual: Tensor, *, act: str | None = "relu", bit_mask: bool = False
) -> tuple[Tensor, Tensor | None]:
    if not storable(x, residual):
        return NotImplemented
    _check(x, residual, act)
    z = empty_rows(x, torch.promote_types(x.dtype, residual.dtype))
    return launch_bn_act(x, (None, None), residual, (None, None), z, act, bit_mask)


@add_act.native
def _add_act_native(
    x: Tensor, residual: Tensor, *, act: str | None = "relu", bit_mask: bool = False
) -> tuple[Tensor, Tensor | None]:
    _check(x, residual, act)
    z = x + residual
    if act == "relu":
        z.relu_()
    return z, pack_relu_mask(z) if bit_mask else None
