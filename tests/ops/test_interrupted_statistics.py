"""Ops that move running statistics, ended at any moment: all of a batch norm's are as they were, or all moved."""

from functools import partial

import pytest
import torch

from fusedres.operands import Norm, NormNumbers, Partials
from fusedres.ops.bn_finalize import bn_finalize
from fusedres.ops.bn_forward import bn_forward
from fusedres.runtime.backends import backend
from tests.interruptions import KINDS, Injection, moments

K = 4


def finalized(norm: Norm) -> None:
    bn_finalize(Partials(torch.tensor([5.0, 3.0]), torch.randn(2, K), torch.rand(2, K)), norm)


def normalised(norm: Norm) -> None:
    bn_forward(torch.randn(2, K, 3, 3).contiguous(memory_format=torch.channels_last), norm)


def fresh() -> Norm:
    torch.manual_seed(0)
    vectors = torch.ones(K), torch.zeros(K), torch.zeros(K), torch.ones(K)
    return Norm(*vectors, None, torch.tensor(0), NormNumbers(1e-5, 0.1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", [finalized, normalised])
def test_all_of_them_moved_or_none(run, kind):
    with backend("native"):
        old, new = fresh(), fresh()
        run(new)
        count = moments(kind, partial(run, fresh()))
        assert count > 5
        for at in range(1, count + 1):
            norm = fresh()
            with pytest.raises(kind, match="injected"), Injection(kind, at):
                run(norm)
            mean, var, counted = (getattr(norm, name) for name in ("running_mean", "running_var", "counted"))
            moved = not torch.equal(mean, old.running_mean)
            after = new if moved else old
            assert torch.equal(mean, after.running_mean) and torch.equal(var, after.running_var), at
            assert counted in ((1,) if moved else (0, 1)), at
