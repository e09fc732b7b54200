"""The statistics of a tensor that is already in memory, in one pass over it."""

import torch
from torch import Tensor

from fusedres.operands import Partials, statistics_dtype
from fusedres.ops.checks import check_activation
from fusedres.ops.op import Op
from fusedres.ops.rows import channels_last, empty_partials, launch_reduction, pixels, reduction_parts, storable


def _bn_statistics(y: Tensor) -> Partials:
    """count = N*H*W, mean = sum(y) / count, m2 = sum((y - mean)^2), per channel, as one partial.

    Args:
        y: (N, C, H, W).

    Returns:
        `Partials`: one of all pixels here, one of each part of them from the kernel.
    """
    check_activation("y", y)
    dtype = statistics_dtype(y.dtype)
    m2, mean = torch.var_mean(y.to(dtype), dim=(0, 2, 3), correction=0)
    return _one_partial(y, mean, m2 * pixels(y))


def _one_partial(y: Tensor, mean: Tensor, m2: Tensor) -> Partials:
    count = torch.full((1,), pixels(y), dtype=mean.dtype, device=mean.device)
    return Partials(count, mean.unsqueeze(0), m2.unsqueeze(0))


bn_statistics = Op(_bn_statistics)


@bn_statistics.triton
def _bn_statistics_triton(y: Tensor) -> Partials:
    if not storable(y):
        return NotImplemented
    check_activation("y", y)
    from fusedres.kernels.bn_statistics import bn_statistics_kernel

    partials = empty_partials(reduction_parts(y), y.shape[1], y.device)
    arguments = {
        "y_ptr": channels_last(y), "count_ptr": partials.counts, "mean_ptr": partials.mean, "m2_ptr": partials.m2,
    }  # fmt: skip
    writes = ("count_ptr", "mean_ptr", "m2_ptr")
    launch_reduction(
        bn_statistics_kernel, y, arguments, reads=("y_ptr",), kind="batch norm", writes=writes, flops=4 * y.numel()
    )
    return partials


@bn_statistics.native
def _bn_statistics_native(y: Tensor) -> Partials:
    if y.device.type != "cpu":
        return NotImplemented
    check_activation("y", y)
    mean, var = torch.ops.aten.batch_norm_update_stats(y.to(statistics_dtype(y.dtype)), None, None, 0.0)
    return _one_partial(y, mean, var * pixels(y))
