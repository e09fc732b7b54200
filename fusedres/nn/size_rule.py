"""Which calls ``"auto"`` leaves to the plain modules on a CPU."""

from typing import Any

import torch
from torch import Tensor

from fusedres.runtime import backends
from fusedres.runtime.graphs import is_graphed

# On a CPU a fused block takes a tenth of a millisecond of Python more than its plain twin: where its convolutions
# multiply less than this for each thread (some 5 ms), that would be felt.
LEAST_WORK_PER_THREAD = 2**28


def too_small(x: Any, weights: int) -> bool:
    """Whether a block of so many ``weights`` is left to its plain modules on a CPU: a fused pass saves less than it
    costs."""
    if not isinstance(x, Tensor) or x.device.type != "cpu" or x.dim() != 4 or backends.current() != "auto":
        return False
    if is_graphed(x):  # a graph is for many sizes, and who compiles a fused model means its passes
        return False
    n, _, h, w = x.shape
    return n * h * w * weights < LEAST_WORK_PER_THREAD * torch.get_num_threads()
