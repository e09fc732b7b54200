"""The schedule of a chain, from what the user asked for, the shapes and whether our kernels run."""

import torch
from torch import Tensor

from ..ops.contract import Geometry
from .schedule import SCHEDULES, Schedule

AUTO = "auto"
LIBRARY = Schedule("library", bit_masks=False)
"""What `auto` runs where no kernel of ours does: one library call per op, each written once, nothing formed twice."""


def check_schedule(name: str) -> None:
    """Refuse a name that is neither ``"auto"`` nor a rung of the ladder."""
    if not isinstance(name, str) or (name != AUTO and name not in SCHEDULES):
        raise ValueError(f"schedule: expected one of {[AUTO, *SCHEDULES]}, got {name!r}")


def chain_schedule(requested: str, *, kernels: bool) -> Schedule:
    """The schedule of a chain; ``kernels``: whether ops run theirs, where they have one.

    Convolutions have none yet, so that the rungs above block_end would form on their own what these are to fuse.
    """
    return SCHEDULES.get(requested, SCHEDULES["block_end"] if kernels else LIBRARY)


def use_moments(requested: str, weight: Tensor, geometry: Geometry, dtype: torch.dtype, *, kernels: bool) -> bool:
    """Whether a block's last convolution (or its projection) is never written.

    The moments of C channels cost C / K of the convolution, forward and backward, and spare the K channels of its
    output. For a bottleneck's end, C / K is a quarter; at a half they still spare more memory than they take.

    Args:
        requested: a rung or ``"auto"``.
        weight: (K, C/groups, R, S).
        geometry: of the convolution.
        dtype: of the contraction.
        kernels: whether ops run theirs.
    """
    k, c, r, s = weight.shape
    possible = (r, s) == (1, 1) and geometry.padding == (0, 0) and geometry.groups == 1
    if requested == AUTO:
        by_library = weight.device.type == "cpu" and not kernels and dtype == torch.float32
        return possible and by_library and 4 * c <= k and c <= AUTO_MOMENTS_CHANNELS
    return possible and SCHEDULES[requested].moments and 2 * c <= k


AUTO_MOMENTS_CHANNELS = 128
