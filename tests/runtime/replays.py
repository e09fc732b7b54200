"""What tests of replayed passes share: how often a pass was gone through, what was noted of it, and a block."""

import functools

import torch
from torch import Tensor, nn

import fusedres
from fusedres.runtime import replay
from fusedres.runtime.notes import Notes
from tests.nn.twins import randomised

TIMES = 4  # the second call is noted, later ones go by the notes


def counting(function):
    """The function, and how often it was gone through."""

    @functools.wraps(function)
    def counted(*operands):
        counted.calls += 1
        return function(*operands)

    counted.calls = 0
    return counted


def noted() -> list[Notes]:
    return [notes for notes in replay._notes.values() if isinstance(notes, Notes)]


def flat(result) -> list:
    return [one for part in result for one in flat(part)] if isinstance(result, tuple) else [result]


def assert_same(ours, theirs):
    for one, other in zip(flat(ours), flat(theirs), strict=True):
        if isinstance(one, Tensor):
            assert torch.equal(one, other) and one.stride() == other.stride() and one.dtype == other.dtype
        else:
            assert one == other


def block(**changes) -> nn.Module:
    torch.manual_seed(0)
    return randomised(fusedres.nn.Bottleneck(16, 8, **changes))
