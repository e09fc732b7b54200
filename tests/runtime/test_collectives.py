"""fusedres.runtime.collectives: what a pass tells a group, here one of this process alone, and how it is replayed."""

import pytest
import torch

from fusedres.context import context
from fusedres.operands import Norm, NormNumbers, OutputGrad
from fusedres.ops.bn_backward import bn_backward
from fusedres.ops.bn_finalize import bn_finalize
from fusedres.ops.bn_statistics import bn_statistics
from fusedres.runtime import replay
from fusedres.runtime.collectives import gathered, is_one_of_several
from fusedres.runtime.replay import replayed
from tests.synchronised import counting

Y = torch.randn(3, 5, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 2


@pytest.fixture(scope="module")
def group():
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("needs gloo")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def norm(group) -> Norm:
    gamma, beta, mean, var = torch.rand((4, 5), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return Norm(gamma, beta, mean, var, counted=torch.tensor(0), numbers=NormNumbers(1e-3, 0.2, group=group))


def both_ways(y: torch.Tensor, dz: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, ...]:
    numbers = bn_finalize(bn_statistics(y), norm)
    return (*bn_backward(OutputGrad(dz), y, numbers, norm.gamma, batch_stats=True), numbers.scale, numbers.shift)


def test_a_group_of_one_is_nobody_else(group):
    assert not is_one_of_several()
    alone, shared = norm(None), norm(group)
    for ours, theirs in zip(both_ways(Y, Y.cos(), shared), both_ways(Y, Y.cos(), alone), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(shared.tensors, alone.tensors, strict=True):
        assert ours is theirs is None or torch.allclose(ours, theirs, rtol=1e-12)


def test_collectives_are_replayed_and_never_twice(group, monkeypatch):
    told = norm(group)
    expected = both_ways(Y, Y.cos(), norm(None))
    for _ in range(4):  # as it is written, noted, by the notes
        with counting() as sent:
            found = replayed(both_ways, Y, Y.cos(), told)
        assert sent["collectives"] == 2
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert len(replay._notes) == 1 and None not in replay._notes.values()
    assert told.counted == 4


def test_on_paper_nobody_is_told(group):
    with counting() as sent:
        every = gathered(torch.empty(7, device="meta"), group)
    assert every.shape == (1, 7) and sent["collectives"] == 0


def test_who_is_absent_counts_nothing(group):
    with context(absent=True):
        numbers = bn_finalize(bn_statistics(Y), norm(group))
    assert numbers.shared.absent and numbers.shared.pixels.tolist() == [0]
