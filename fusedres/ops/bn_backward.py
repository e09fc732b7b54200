"""The backward pass of batch norm: its two sums, the coefficients they make, and the gradient they give."""

from typing import Any

import torch
from torch import Tensor

from ..launch import launch
from ..plan.tiles import PartialTile
from .contract import Normaliser, OutputGrad, channels_last, per_channel, pixels, statistics_dtype
from .op import Op
from .relu_mask import laid_out, relu_backward
from .rows import empty_rows, launch_reduction, launch_rows, reduction_parts, storable


def masked(dy: OutputGrad) -> Tensor:
    """The gradient behind the ReLU, without p, q, r."""
    return dy.g if dy.mask is None else relu_backward(dy.g, dy.mask, scratch=dy.scratch)


def _bn_backward_reduce(g: OutputGrad, y: Tensor, norm: Normaliser) -> tuple[Tensor, Tensor]:
    """sum(g) and sum(g * y_hat) over the pixels, with y_hat = (y - mean) * invstd: the gradients of beta and gamma.

    Args:
        g: (N, K, P, Q), masked on load.
        y: (N, K, P, Q) raw convolution output.
        norm: the `Normaliser` of the forward pass.

    Returns:
        Two (K,) tensors in the statistics dtype.
    """
    dtype = norm.mean.dtype
    grad = masked(g).to(dtype)
    normalised = (y.to(dtype) - per_channel(norm.mean)) * per_channel(norm.invstd)
    return grad.sum((0, 2, 3)), (grad * normalised).sum((0, 2, 3))


bn_backward_reduce = Op(_bn_backward_reduce)


@bn_backward_reduce.triton
def _bn_backward_reduce_triton(g: OutputGrad, y: Tensor, norm: Normaliser) -> tuple[Tensor, Tensor]:
    sums = _reduced(g, y, norm, coefficients=False)
    return sums if sums is NotImplemented else sums[:2]


def _reduced(g: OutputGrad, y: Tensor, norm: Normaliser, *, coefficients: bool) -> Any:
    """sum(g), sum(g * y_hat) and, if asked for, q and r of `bn_backward_coefficients` (else None), by the kernels."""
    if not storable(g.g, y):
        return NotImplemented
    from ..kernels.bn_backward import bn_backward_finish_kernel, bn_backward_reduce_kernel

    parts, channels = reduction_parts(y), y.shape[1]
    sums, products = torch.empty((2, parts, channels), dtype=torch.float32, device=y.device)
    arguments = {
        "g_ptr": channels_last(g.g), "mask_ptr": laid_out(g.mask), "y_ptr": channels_last(y), "mean_ptr": norm.mean,
        "part_g_ptr": sums, "part_gd_ptr": products,
    }  # fmt: skip
    launch_reduction(
        bn_backward_reduce_kernel, y, arguments, reads=("g_ptr", "mask_ptr", "y_ptr", "mean_ptr"),
        writes=("part_g_ptr", "part_gd_ptr"), flops=(4 + (g.mask is not None)) * y.numel(),
    )  # fmt: skip
    tile = PartialTile()
    results = torch.empty((4 if coefficients else 2, channels), dtype=torch.float32, device=y.device)
    names = ("sum_g_ptr", "sum_gy_ptr", "q_ptr", "r_ptr")
    written: dict[str, Tensor | None] = {**dict.fromkeys(names), **dict(zip(names, results, strict=False))}
    read = {
        "part_g_ptr": sums, "part_gd_ptr": products, "invstd_ptr": norm.invstd,
        "scale_ptr": norm.scale if coefficients else None,
    }  # fmt: skip
    numbers = {
        "parts": parts, "rows": pixels(y), "C": channels, "BLOCK_PARTS": tile.block_parts, "BLOCK_C": tile.block_c,
    }  # fmt: skip
    launch(
        bn_backward_finish_kernel, (-(-channels // tile.block_c),), {**read, **written, **numbers},
        reads=tuple(read), writes=names, flops=2 * parts * channels, num_warps=tile.num_warps,
    )  # fmt: skip
    return tuple(written.values())


def bn_backward_coefficients(
    sum_g: Tensor, sum_gy: Tensor, count: int, norm: Normaliser, *, batch_stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """p, q, r (K,) of dy = p * g + q * (y - mean) + r, from batch norm's two sums over ``count`` pixels.

    With a = scale, m1 = sum_g / count, m2 = sum_gy / count:  dy = a * (g - m1 - y_hat * m2), so
    p = a,  q = -a * m2 * invstd,  r = -a * m1. With frozen statistics q and r are zero (None).
    """
    if not batch_stats:
        return norm.scale, None, None
    q = -norm.scale * norm.invstd * sum_gy / count
    return norm.scale, q, -norm.scale * sum_g / count


def _bn_backward_apply(dy: OutputGrad) -> Tensor:
    """dy = p * g + q * (y - mean) + r, written to memory.

    Args:
        dy: its parts; ``q``, ``r`` may be None (zero), as may ``p`` (the masked g itself).

    Returns:
        (N, K, P, Q) in the dtype of ``g``.
    """
    grad = masked(dy)
    if dy.p is None:
        return grad
    out = grad.to(dy.p.dtype) * per_channel(dy.p)
    if dy.q is not None and dy.r is not None and dy.y is not None:
        y = dy.y.to(dy.p.dtype)
        centred = y if dy.mean is None else y - per_channel(dy.mean)
        out = out + centred * per_channel(dy.q) + per_channel(dy.r)
    return out.to(dy.g.dtype)


bn_backward_apply = Op(_bn_backward_apply)


def gradient_arguments(dy: OutputGrad) -> dict[str, Tensor | None]:
    """The parts of dy as kernels that form it are told of them; all of y's part or nothing of it."""
    whole = dy.q is not None and dy.r is not None and dy.y is not None
    y_part = {"y_ptr": laid_out(dy.y), "q_ptr": dy.q, "r_ptr": dy.r, "mean_ptr": dy.mean}
    return {
        "g_ptr": channels_last(dy.g), "mask_ptr": laid_out(dy.mask), "p_ptr": dy.p,
        **(y_part if whole else dict.fromkeys(y_part)),
    }  # fmt: skip


@bn_backward_apply.triton
def _bn_backward_apply_triton(dy: OutputGrad) -> Tensor:
    if dy.p is None:
        return masked(dy)
    if not storable(dy.g, dy.y):
        return NotImplemented
    from ..kernels.bn_backward import bn_backward_apply_kernel

    out = empty_rows(dy.g)
    arguments = gradient_arguments(dy)
    launch_rows(
        bn_backward_apply_kernel, dy.g, {**arguments, "dy_ptr": out}, reads=tuple(arguments), writes=("dy_ptr",),
        flops=(1 + (dy.mask is not None) + 4 * (arguments["q_ptr"] is not None)) * out.numel(),
    )  # fmt: skip
    return out


def _bn_backward(
    g: OutputGrad, y: Tensor, norm: Normaliser, gamma: Tensor | None, *, batch_stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Both passes in one op: (dy, dgamma, dbeta) by `bn_backward_reduce` and `bn_backward_apply`.

    Args:
        g: (N, K, P, Q) gradient at the activation's output, masked on load.
        y: (N, K, P, Q) raw convolution output.
        norm: the `Normaliser` of the forward pass.
        gamma: (K,) or None.
        batch_stats: whether mean and invstd came from this batch (else they are constants).

    Returns:
        dy (N, K, P, Q) in the dtype of y, dgamma and dbeta (K,) in the statistics dtype.
    """
    dbeta, dgamma = bn_backward_reduce(g, y, norm)
    p, q, r = bn_backward_coefficients(dbeta, dgamma, pixels(y), norm, batch_stats=batch_stats)
    return bn_backward_apply(g._replace(y=y, p=p, q=q, r=r, mean=norm.mean)), dgamma, dbeta


bn_backward = Op(_bn_backward)


@bn_backward.triton
def _bn_backward_triton(
    g: OutputGrad, y: Tensor, norm: Normaliser, gamma: Tensor | None, *, batch_stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    reduced = _reduced(g, y, norm, coefficients=batch_stats)
    if reduced is NotImplemented:
        return NotImplemented
    dbeta, dgamma, q, r = reduced
    return bn_backward_apply(g._replace(y=y, p=norm.scale, q=q, r=r, mean=norm.mean)), dgamma, dbeta


@bn_backward.native
def _bn_backward_native(
    g: OutputGrad, y: Tensor, norm: Normaliser, gamma: Tensor | None, *, batch_stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if gamma is None or not batch_stats:
        return NotImplemented
    # Where the two layouts differ the library sums in the storage dtype (dbeta off by 2e-3 in bf16).
    dtype = statistics_dtype(y.dtype)
    grad, raw = (channels_last(tensor.to(dtype)) for tensor in (masked(g), y))
    dy, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        grad, raw, gamma.to(dtype), None, None, norm.mean, norm.invstd, True, 0.0, [True, True, True]
    )
    return dy.to(y.dtype), dgamma, dbeta
