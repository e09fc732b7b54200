"""The moments of a 1x1 convolution's input: all that batch norm needs to know of an output that is never written."""

import torch
from torch import Tensor

from . import onednn
from .contract import (
    ConvInput,
    Geometry,
    Moments,
    Partials,
    as_rows,
    channels_last,
    check_activation,
    per_channel,
    pixels,
    statistics_dtype,
)
from .conv_forward import formed
from .conv_weight_grad import weight_grad
from .op import Op

# Rows are taken in pieces of 1 MiB of fp32, which stay in a core's second-level cache between the passes over them.
_PIECE = 1 << 18


def sampled(u: ConvInput, stride: tuple[int, int]) -> ConvInput:
    """The pixels that a 1x1 convolution of this stride looks at (a view)."""
    return u if stride == (1, 1) else u._replace(tensor=u.tensor[:, :, :: stride[0], :: stride[1]])


def _input_moments(u: ConvInput, stride: tuple[int, int] = (1, 1)) -> Moments:
    """mean = sum(u) / n and m2 = sum((u - mean)(u - mean)^T) over the n pixels that a 1x1 convolution reads.

    Both are accumulated about a reference row (the mean of the first piece), so that a mean that is large against
    the deviation does not cancel: with t = u - row,  mean = row + sum(t) / n,  m2 = sum(t t^T) - sum(t) sum(t)^T / n.

    Args:
        u: (N, C, H, W), formed on load if it has a scale.
        stride: of the 1x1 convolution.

    Returns:
        `Moments` in the statistics dtype: n, (C,), (C, C).
    """
    check_activation("u", u.tensor)
    tensor, scale, shift = sampled(u, stride)
    rows = as_rows(tensor)
    n, channels = rows.shape
    dtype = statistics_dtype(rows.dtype)

    def piece(part: Tensor) -> Tensor:
        return formed(ConvInput(part[:, :, None, None], scale, shift)).flatten(1).to(dtype)

    parts = rows.split(max(1, _PIECE // channels))
    row = piece(parts[0]).mean(0)
    total = torch.zeros_like(row)
    gram = torch.zeros((channels, channels), dtype=dtype, device=rows.device)
    for part in parts:
        t = piece(part) - row
        total += t.sum(0)
        gram.addmm_(t.t(), t)
    return Moments(n, row + total / n, gram - torch.outer(total, total / n))


input_moments = Op(_input_moments)


@input_moments.native
def _input_moments_native(u: ConvInput, stride: tuple[int, int] = (1, 1)) -> Moments:
    if not onednn.runs(u.tensor):
        return NotImplemented
    check_activation("u", u.tensor)
    seen = channels_last(formed(sampled(u, stride)))
    n = pixels(seen)
    row = torch.ops.aten.batch_norm_update_stats(seen, None, None, 0.0)[0]
    t = seen - per_channel(row)
    rest = as_rows(t).sum(0)  # what the rounding of ``row`` left
    gram = weight_grad(t, t, (1, 1), Geometry()).flatten(1)
    return Moments(n, row + rest / n, gram - torch.outer(rest, rest / n))


def moments_statistics(moments: Moments, weight: Tensor) -> Partials:
    """The statistics of y = W u from the moments of u: mean = W mean_u, m2 = rowsum((W m2_u) * W), never negative.

    Args:
        moments: of the input, (C,) and (C, C).
        weight: (K, C, 1, 1), the rounded one that the contraction uses.

    Returns:
        `Partials` with T = 1.
    """
    w = weight.flatten(1).to(moments.mean.dtype)
    m2 = ((w @ moments.m2) * w).sum(1).clamp_min(0)
    count = torch.full((1,), moments.pixels, dtype=m2.dtype, device=m2.device)
    return Partials(count, (w @ moments.mean).unsqueeze(0), m2.unsqueeze(0))
