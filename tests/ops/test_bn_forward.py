"""fusedres.ops.bn_forward: batch norm of a tensor in memory, and its activation."""

import pytest
import torch
from torch.nn.functional import batch_norm

from fusedres.activation import IDENTITY, RELU
from fusedres.operands import Norm, NormNumbers
from fusedres.ops.bn_forward import bn_forward
from tests.comparison import STORAGE, assert_as_accurate_as_eager, assert_close

SIZES = {
    "even": (2, 8, 4, 4),
    "odd": (3, 5, 7, 3),
    "one image": (1, 3, 5, 5),
    "one pixel each": (6, 4, 1, 1),
    "one channel": (2, 1, 3, 3),
}


def vectors(channels, dtype, *which):
    made = {
        "gamma": torch.randn(channels, dtype=dtype),
        "beta": torch.randn(channels, dtype=dtype),
        "running_mean": torch.randn(channels, dtype=dtype),
        "running_var": torch.rand(channels, dtype=dtype) + 0.5,
    }
    return [made[name] if name in which else None for name in made]


ALL = ("gamma", "beta", "running_mean", "running_var")
PARTS = {
    "all": ALL,
    "no running statistics": ALL[:2],
    "not affine": ALL[2:],
    "no beta": ("gamma", "running_mean", "running_var"),
    "no gamma": ("beta",),
}


@pytest.mark.parametrize("act", [RELU, IDENTITY], ids=str)
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("case", SIZES)
def test_is_batch_norm(case, parts, act, each_backend):
    y = torch.randn(SIZES[case], dtype=torch.float64) * 2 + 1
    gamma, beta, running_mean, running_var = vectors(y.shape[1], torch.float64, *PARTS[parts])
    running = [None if r is None else r.clone() for r in (running_mean, running_var)]
    counted = torch.tensor(2)
    stored = Norm(gamma, beta, *running, counted=counted, numbers=NormNumbers(1e-3, 0.3))
    z, _, norm = bn_forward(y, stored, act=act)
    assert counted.item() == 3
    exact = batch_norm(y, running_mean, running_var, gamma, beta, True, 0.3, 1e-3)
    assert_close(z, act.value(exact))
    assert_close(norm.mean, y.mean((0, 2, 3)))
    assert_close(norm.invstd, (y.var((0, 2, 3), correction=0) + 1e-3) ** -0.5)
    assert_close(y * norm.scale[:, None, None] + norm.shift[:, None, None], exact)
    if running_mean is not None:
        assert_close(running[0], running_mean, name="running_mean")
        assert_close(running[1], running_var, name="running_var")


def test_bias_of_the_convolution_moves_the_running_mean_alone(each_backend):
    y = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    bias = torch.randn(5, dtype=torch.float64)
    gamma, beta, running_mean, running_var = vectors(5, torch.float64, *ALL)
    running = [running_mean.clone(), running_var.clone()]
    z, _, _ = bn_forward(y, Norm(gamma, beta, *running, bias))
    exact = batch_norm(y + bias[:, None, None], running_mean, running_var, gamma, beta, True).relu()
    assert_close(z, exact)
    assert_close(running[0], running_mean)
    assert_close(running[1], running_var)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("pure", [False, True], ids=["fp32 parameters", "parameters of the dtype"])
def test_rounds_no_more_than_eager(dtype, pure, each_backend):
    y = (torch.randn(4, 6, 7, 9) * 2 + 1).to(dtype)
    own = dtype if pure else torch.float32
    gamma, beta, running_mean, running_var = vectors(6, own, *ALL)
    ours = [running_mean.clone(), running_var.clone()]
    exact_running = [running_mean.double(), running_var.double()]
    z, _, _ = bn_forward(y, Norm(gamma, beta, *ours))
    eager = batch_norm(y, running_mean, running_var, gamma, beta, True).relu()
    exact = batch_norm(y.double(), *exact_running, gamma.double(), beta.double(), True).relu()
    assert_as_accurate_as_eager(z, eager, exact)
    assert_as_accurate_as_eager(ours[0], running_mean, exact_running[0], name="running_mean")
    assert_as_accurate_as_eager(ours[1], running_var, exact_running[1], name="running_var")


def test_large_mean_in_fp32(each_backend):
    """|mean| / std = 1e3."""
    y = (torch.randn(4, 6, 16, 16, dtype=torch.float64) + 1e3).float()
    z, _, _ = bn_forward(y, Norm(torch.ones(6), torch.zeros(6)), act=IDENTITY)
    eager = batch_norm(y, None, None, torch.ones(6), torch.zeros(6), True)
    exact = batch_norm(y.double(), None, None, None, None, True)
    assert_as_accurate_as_eager(z, eager, exact)


def test_refused_by_name(each_backend):
    with pytest.raises(ValueError, match="y: expected a 4-D tensor"):
        bn_forward(torch.zeros(2, 3), Norm(torch.ones(3), torch.zeros(3)))
    with pytest.raises(ValueError, match=r"gamma: expected shape \(4,\), got \(3,\)"):
        bn_forward(torch.zeros(2, 4, 3, 3), Norm(torch.ones(3), torch.zeros(4)))
    with pytest.raises(TypeError, match="act: expected an Activation, got 'relu'"):
        bn_forward(torch.zeros(2, 3, 4, 4), Norm(), act="relu")
