"""fusedres.kernels.act_mask, compiled and executed: gradients behind a ReLU, by bits and by its output."""

import pytest
import torch

from fusedres.ops.act_mask import act_backward, pack_relu_mask
from fusedres.plan.tiles import pinned, row_tiles
from tests.kernels.executed import SIZES, TESTED, activation, covering, executed


@pytest.mark.parametrize("kind", ["bits", "output"])
@pytest.mark.parametrize(("case", "target", "dtype"), covering(SIZES))
def test_gradient_where_the_relu_was_open(case: str, target: str, dtype: torch.dtype, kind: str) -> None:
    g, z = activation(SIZES[case], dtype), torch.relu(activation(SIZES[case], dtype))
    out, trace = executed(target, lambda: act_backward(g, pack_relu_mask(z) if kind == "bits" else z))
    assert trace.by_kernel() == {"act_backward_kernel": 1}
    assert torch.equal(out, torch.where(z > 0, g, 0.0))
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("case", "target", "dtype"), covering(["8 divides C", "a row is several pieces", "odd C"]))
def test_every_tile(case: str, target: str, dtype: torch.dtype) -> None:
    size = SIZES[case]
    g, z = activation(size, dtype), torch.relu(activation(size, dtype))
    for tile in row_tiles(size[0] * size[2] * size[3], size[1], dtype.itemsize):
        with pinned(tile):
            out, _ = executed(target, lambda: act_backward(g, pack_relu_mask(z)))
        assert torch.equal(out, torch.where(z > 0, g, 0.0))


@pytest.mark.parametrize("target", TESTED)
def test_a_closed_relu_stops_what_is_not_finite(target: str) -> None:
    g = torch.full((1, 8, 1, 2), float("nan"))
    z = torch.tensor([[0.0, 1.0]]).expand(1, 8, 1, 2).contiguous(memory_format=torch.channels_last)
    out, _ = executed(target, lambda: act_backward(g, z))
    assert (out[..., 0] == 0).all()
    assert out[..., 1].isnan().all()
