"""The backward pass of a 1x1 convolution and its batch norm without the convolution's output.

With g the masked gradient behind the batch norm, D = sum(g u^T) (the one large contraction of the weight gradient),
mean and M the `Moments` of the input u, and a, invstd of the `Normaliser`:

    D' = D - sum(g) mean^T      dgamma = invstd * rowsum(W * D')      dbeta = sum(g)
    m1 = dbeta / n    m2 = dgamma / n    q = a * m2 * invstd
    dW = a * D' - q * (W M)
    du = (a * g) W - u Q - c    Q = W^T diag(q) W    c = W^T (a * m1) - Q mean

which follows from dy = a * (g - m1 - y_hat * m2) and y_hat = invstd * W (u - mean). D' and M are centred, so that dW
and dgamma lose nothing where the mean is large. In du, where u meets Q as it is, u Q and Q mean cancel there.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import onednn
from .bn_backward import masked
from .contract import (
    ConvInput,
    Geometry,
    Moments,
    Normaliser,
    OutputGrad,
    as_rows,
    channels_last,
    from_rows,
    statistics_dtype,
)
from .conv_forward import formed
from .conv_weight_grad import weight_grad
from .input_moments import sampled
from .op import Op


class MomentsGrad(NamedTuple):
    """The parameters' gradients in the statistics dtype: ``dweight`` (K, C), ``dgamma`` (K,), ``dbeta`` (K,)."""

    dweight: Tensor
    dgamma: Tensor
    dbeta: Tensor


class InputGradMatrices(NamedTuple):
    """du = g ``weight`` - u ``quadratic`` - ``constant``, in the statistics dtype.

    ``weight`` = a * W (K, C), ``quadratic`` = Q (C, C) and ``constant`` = c (C,), the last two None under frozen
    statistics.
    """

    weight: Tensor
    quadratic: Tensor | None
    constant: Tensor | None


def _moments_contraction(
    g: OutputGrad, u: ConvInput, kernel: tuple[int, int], geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """D = sum(g u^T) and sum(g) over the pixels.

    Args:
        g: (N, K, P, Q), masked on load.
        u: (N, C, H, W) input of the convolution, formed on load.
        kernel: (R, S); u^T is the window of C R S values under it.
        geometry: of the convolution.

    Returns:
        D (K, C R S) and sum(g) (K,) in the statistics dtype.
    """
    # D is centred afterwards, so it must not be rounded to 16 bits on the way, as the library's own would be.
    dtype = statistics_dtype(u.tensor.dtype)
    grad = masked(g).to(dtype)
    d = weight_grad(grad, formed(u).to(dtype), kernel, geometry).flatten(1)
    return d, as_rows(grad).sum(0)


moments_contraction = Op(_moments_contraction)


def moments_weight_grad(
    d: Tensor, sum_g: Tensor, count: int, mean: Tensor, product: Tensor, weight: Tensor, norm: Normaliser
) -> tuple[Tensor, Tensor, Tensor]:
    """dW, dgamma and q by the formulas above, for a convolution of any kernel.

    Args:
        d: (K, C R S), sum_g: (K,), from `moments_contraction`.
        count: n.
        mean: (C R S,) of the input's windows.
        product: W M (K, C R S), which is also the sum of (y - mean_y) u^T.
        weight: (K, C R S), the rounded one that the contraction used.
        norm: the `Normaliser` of the forward pass.
    """
    centred = d - torch.outer(sum_g, mean)
    dgamma = norm.invstd * (weight * centred).sum(1)
    q = norm.scale * norm.invstd * dgamma / count
    return norm.scale.unsqueeze(1) * centred - q.unsqueeze(1) * product, dgamma, q


def frozen_weight_grad(d: Tensor, sum_g: Tensor, weight: Tensor, norm: Normaliser) -> tuple[Tensor, Tensor]:
    """dW = a * D and dgamma = invstd * (rowsum(W * D) - mean * dbeta), for frozen statistics (m1 = m2 = 0)."""
    return norm.scale.unsqueeze(1) * d, norm.invstd * ((weight * d).sum(1) - norm.mean * sum_g)


def moments_backward(
    d: Tensor, sum_g: Tensor, moments: Moments | None, weight: Tensor, norm: Normaliser
) -> tuple[MomentsGrad, InputGradMatrices]:
    """The small matrices from D and sum(g), by the formulas above.

    Args:
        d: (K, C), sum_g: (K,), from `moments_contraction`.
        moments: of the input; None when mean and variance are frozen.
        weight: (K, C, 1, 1), the rounded one that the contraction used.
        norm: the `Normaliser` of the forward pass.
    """
    w = weight.flatten(1).to(d.dtype)
    if moments is None:
        dweight, dgamma = frozen_weight_grad(d, sum_g, w, norm)
        return MomentsGrad(dweight, dgamma, sum_g), frozen_matrices(weight, norm)
    count, mean, m2 = moments
    dweight, dgamma, q = moments_weight_grad(d, sum_g, count, mean, w @ m2, w, norm)
    quadratic = w.t() @ (q.unsqueeze(1) * w)
    constant = w.t() @ (norm.scale * sum_g / count) - quadratic @ mean
    scaled = norm.scale.unsqueeze(1) * w
    return MomentsGrad(dweight, dgamma, sum_g), InputGradMatrices(scaled, quadratic, constant)


def frozen_matrices(weight: Tensor, norm: Normaliser) -> InputGradMatrices:
    """Those of a batch norm with frozen statistics; weight (K, C, 1, 1)."""
    return InputGradMatrices(norm.scale.unsqueeze(1) * weight.flatten(1).to(norm.scale.dtype), None, None)


def _moments_input_grad(
    g: OutputGrad, matrices: InputGradMatrices, u: ConvInput, geometry: Geometry, *, add: OutputGrad | None = None
) -> Tensor:
    """du = (a * g) W - u Q - c at the pixels that the 1x1 convolution reads, zero elsewhere, plus the masked ``add``.

    Args:
        g: (N, K, P, Q), masked on load.
        matrices: from `moments_backward`.
        u: (N, C, H, W) input of the 1x1 convolution, formed on load.
        geometry: of the 1x1 convolution (stride alone).
        add: another gradient of the same input, (N, C, H, W), masked on load, or None.

    Returns:
        du (N, C, H, W) channels_last, in the wider dtype of u and ``add``.
    """
    seen = sampled(u, geometry.stride)
    dtype = statistics_dtype(u.tensor.dtype)
    rows = as_rows(masked(g)).to(dtype) @ matrices.weight
    if matrices.quadratic is not None and matrices.constant is not None:
        rows.addmm_(as_rows(formed(seen)).to(dtype), matrices.quadratic, alpha=-1).sub_(matrices.constant)
    du = _spread(from_rows(rows, seen.tensor), u.tensor, geometry.stride)
    if add is None:
        return du.to(u.tensor.dtype)
    return (du + masked(add)).to(torch.promote_types(u.tensor.dtype, add.g.dtype))


def _spread(seen: Tensor, like: Tensor, stride: tuple[int, int]) -> Tensor:
    """``seen`` at every stride-th pixel of a tensor shaped like ``like``, zero elsewhere."""
    if stride == (1, 1):
        return seen
    spread = torch.zeros_like(like, dtype=seen.dtype, memory_format=torch.channels_last)
    spread[:, :, :: stride[0], :: stride[1]] = seen
    return spread


moments_input_grad = Op(_moments_input_grad)


@moments_input_grad.native
def _moments_input_grad_native(
    g: OutputGrad, matrices: InputGradMatrices, u: ConvInput, geometry: Geometry, *, add: OutputGrad | None = None
) -> Tensor:
    if not onednn.runs(u.tensor) or (add is not None and add.g.dtype != u.tensor.dtype):
        return NotImplemented
    linear = onednn.pointwise(matrices.weight.t())
    if matrices.quadratic is None or matrices.constant is None:
        du = onednn.conv_act(masked(g), linear)
    else:
        seen = channels_last(formed(sampled(u, geometry.stride)))
        du = onednn.conv_act(seen, onednn.pointwise(-matrices.quadratic, -matrices.constant))
        onednn.conv_onto(du, masked(g), linear)
    du = _spread(du, u.tensor, geometry.stride)
    return du if add is None else du.add_(masked(add))
