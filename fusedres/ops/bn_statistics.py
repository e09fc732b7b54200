"""The statistics of a tensor that is already in memory, in one pass over it."""

import torch
from torch import Tensor

from .contract import Partials, check_activation, pixels, statistics_dtype
from .op import Op


def _bn_statistics(y: Tensor) -> Partials:
    """count = N*H*W, mean = sum(y) / count, m2 = sum((y - mean)^2), per channel, as one partial.

    Args:
        y: (N, C, H, W).

    Returns:
        `Partials` with T = 1.
    """
    check_activation("y", y)
    dtype = statistics_dtype(y.dtype)
    m2, mean = torch.var_mean(y.to(dtype), dim=(0, 2, 3), correction=0)
    return _one_partial(y, mean, m2 * pixels(y))


def _one_partial(y: Tensor, mean: Tensor, m2: Tensor) -> Partials:
    count = torch.full((1,), pixels(y), dtype=mean.dtype, device=mean.device)
    return Partials(count, mean.unsqueeze(0), m2.unsqueeze(0))


bn_statistics = Op(_bn_statistics)


@bn_statistics.native
def _bn_statistics_native(y: Tensor) -> Partials:
    if y.device.type != "cpu":
        return NotImplemented
    check_activation("y", y)
    mean, var = torch.ops.aten.batch_norm_update_stats(y.to(statistics_dtype(y.dtype)), None, None, 0.0)
    return _one_partial(y, mean, var * pixels(y))
