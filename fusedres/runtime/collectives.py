"""What the processes of a group tell each other within a pass: every one's numbers to every one, by one collective.

Numbers are gathered and added up by whoever needs them, in the order of the ranks, so that all processes go on with the
same bits. A process that has no samples takes part all the same, else the others would wait for it: it runs the pass
on one sample of zeros (`patterns.door`), and says that it counted none.
"""

from typing import Any

import torch
from torch import Tensor

from fusedres.context import here


def is_one_of_several() -> bool:
    """Whether this process belongs to several that were told of each other."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def gathered(numbers: Tensor, group: Any) -> Tensor:
    """What every process of a group has.

    Args:
        numbers: (K,) of this one, of the same size and dtype in all.
        group: the `torch.distributed.ProcessGroup`.

    Returns:
        (processes, K), in the order of the ranks.

    Raises:
        RuntimeError: another process is gone, or did not come within the group's timeout.
    """
    processes = torch.distributed.get_world_size(group)
    every = numbers.new_empty(processes * numbers.numel())
    if not numbers.is_meta:
        _tell(every, numbers, group)
    return every.view(processes, -1)


def _tell(every: Tensor, numbers: Tensor, group: Any) -> None:
    """`exchange`, which whoever takes notes of a pass does again."""
    follower = here().follower
    if follower is None:
        exchange(every, numbers, group)
        return
    with follower.apart():
        exchange(every, numbers, group)
    follower.launched(exchange, (every, numbers, group), on_gpu=False)


# By its name in PyTorch 2.9, and the one that takes its place.
all_gather = getattr(torch.distributed, "all_gather_single", None) or getattr(
    torch.distributed, "all_gather_into_tensor", None
)


def exchange(every: Tensor, numbers: Tensor, group: Any) -> None:
    """The collective: ``every`` (processes * K,) is written."""
    assert all_gather is not None
    all_gather(every, numbers, group=group)
