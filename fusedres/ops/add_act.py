"""Add and activate: the end of a residual block whose branches need no normalisation here."""

import torch
from torch import Tensor

from fusedres.activation import RELU, Activation
from fusedres.operands import statistics_dtype
from fusedres.ops.act_mask import activated
from fusedres.ops.bn_act import check_act, launch_bn_act
from fusedres.ops.checks import check_activation
from fusedres.ops.op import Op
from fusedres.ops.rows import empty_rows, storable


def _check(x: Tensor, residual: Tensor, *, act: Activation = RELU, bit_mask: bool = False) -> None:
    check_activation("x", x)
    check_activation("residual", residual)
    if residual.shape != x.shape:
        raise ValueError(f"residual: expected the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}")
    check_act(act)


def _add_act(
    x: Tensor, residual: Tensor, *, act: Activation = RELU, bit_mask: bool = False
) -> tuple[Tensor, Tensor | None]:
    """z = act(x + residual).

    Args:
        x: (N, C, H, W).
        residual: (N, C, H, W).
        act: the activation.
        bit_mask: whether to return what a backward pass tells its slope from too.

    Returns:
        z (N, C, H, W), rounded once to the wider dtype of the two, and its mask (`activated`) or None.
    """
    dtype = torch.promote_types(x.dtype, residual.dtype)
    z = x.to(statistics_dtype(dtype)) + residual.to(statistics_dtype(dtype))
    return activated(z, act, dtype, bit_mask=bit_mask)


add_act = Op(_add_act, check=_check)


@add_act.triton
def _add_act_triton(
    x: Tensor, residual: Tensor, *, act: Activation = RELU, bit_mask: bool = False
) -> tuple[Tensor, Tensor | None]:
    if not storable(x, residual):
        return NotImplemented
    z = empty_rows(x, torch.promote_types(x.dtype, residual.dtype))
    return launch_bn_act(x, (None, None), residual, (None, None), z, act, bit_mask)


@add_act.native
def _add_act_native(
    x: Tensor, residual: Tensor, *, act: Activation = RELU, bit_mask: bool = False
) -> tuple[Tensor, Tensor | None]:
    z = x + residual
    return activated(z, act, z.dtype, bit_mask=bit_mask, scratch=True)
