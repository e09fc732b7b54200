"""The backward pass of batch norm: its two sums, the coefficients they make, and the gradient they give."""

import torch
from torch import Tensor

from .contract import Normaliser, OutputGrad, channels_last, per_channel, pixels, statistics_dtype
from .op import Op
from .relu_mask import relu_backward


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
