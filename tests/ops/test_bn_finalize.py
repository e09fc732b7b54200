"""fusedres.ops.bn_finalize: partials combined without cancellation, running statistics as nn.BatchNorm2d's."""

import pytest
import torch
from torch import nn

from fusedres.operands import Norm, NormNumbers, Partials
from fusedres.ops.bn_finalize import bn_finalize, bn_from_running
from tests.comparison import assert_close, relative_error

K = 5


def partials_of(rows: torch.Tensor, counts: list[int]) -> Partials:
    """Of consecutive pieces of (n, K) rows, each measured on its own in the rows' dtype."""
    parts = rows.split(counts)
    means = torch.stack([part.mean(0) for part in parts])
    m2 = torch.stack([(part - part.mean(0)).square().sum(0) for part in parts])
    return Partials(torch.tensor(counts, dtype=rows.dtype), means, m2)


COUNTS = {
    "one": [60],
    "equal": [20, 20, 20],
    "unequal": [1, 37, 5, 17],
    "single pixels": [1] * 60,
    "short last tile": [16, 16, 16, 12],
}


@pytest.mark.parametrize("case", COUNTS)
def test_partials_together_are_the_whole(case, each_backend):
    rows = torch.randn(60, K, dtype=torch.float64) * 3 + torch.linspace(0, 4, 60, dtype=torch.float64)[:, None]
    gamma, beta = torch.randn(K, dtype=torch.float64), torch.randn(K, dtype=torch.float64)
    norm = bn_finalize(partials_of(rows, COUNTS[case]), Norm(gamma, beta, numbers=NormNumbers(1e-3)))
    invstd = (rows.var(0, correction=0) + 1e-3) ** -0.5
    assert_close(norm.mean, rows.mean(0))
    assert_close(norm.invstd, invstd)
    assert_close(norm.scale, gamma * invstd)
    assert_close(norm.shift, beta - rows.mean(0) * gamma * invstd)


def test_large_mean_keeps_the_variance_in_fp32(each_backend):
    """|mean| / std = 1e4: E[y^2] - E[y]^2 of the same partials has nothing left of the variance."""
    rows = (torch.randn(4096, K, dtype=torch.float64) + 1e4).float()
    partials = partials_of(rows, [1000, 96, 2000, 1000])
    exact = rows.double().var(0, correction=0)
    variance = bn_finalize(partials, Norm(numbers=NormNumbers(0.0))).invstd.double() ** -2
    assert_close(variance, exact, 1e-4)
    second = ((partials.m2 + partials.mean.square() * partials.counts[:, None]).sum(0)) / 4096
    first = (partials.mean * partials.counts[:, None]).sum(0) / 4096
    assert relative_error(second - first.square(), exact) > 1e-2, "this test has no teeth"


def test_absent_gamma_and_beta_are_one_and_zero(each_backend):
    partials = partials_of(torch.randn(30, K, dtype=torch.float64), [30])
    ones, zeros = torch.ones(K, dtype=torch.float64), torch.zeros(K, dtype=torch.float64)
    for ours, given in zip(
        bn_finalize(partials, Norm())[:4], bn_finalize(partials, Norm(ones, zeros))[:4], strict=True
    ):
        assert_close(ours, given, 1e-15)
    only_beta = bn_finalize(partials, Norm(None, ones))
    assert_close(only_beta.shift, 1 - only_beta.mean * only_beta.invstd)


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, 0.37])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_running_statistics_are_those_of_batchnorm2d(dtype, biased, momentum, each_backend):
    bn = nn.BatchNorm2d(K, momentum=momentum, dtype=dtype)
    nn.init.normal_(bn.running_mean)
    nn.init.uniform_(bn.running_var)
    running_mean, running_var = bn.running_mean.clone(), bn.running_var.clone()
    bias = torch.randn(K, dtype=dtype) if biased else None
    for _ in range(3):
        y = torch.randn(4, K, 3, 5, dtype=dtype) * 2 + 1
        bn(y if bias is None else y + bias[:, None, None])
        rows = y.permute(0, 2, 3, 1).reshape(-1, K)
        tensors = bn.weight.detach(), bn.bias.detach(), running_mean, running_var, bias
        bn_finalize(partials_of(rows, [7, 13, 40]), Norm(*tensors, numbers=NormNumbers(momentum=momentum)))
    tolerance = 1e-14 if dtype == torch.float64 else 5e-7
    assert_close(running_mean, bn.running_mean, tolerance)
    assert_close(running_var, bn.running_var, tolerance)
    assert running_mean.dtype == running_var.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_batches_are_counted(dtype, each_backend):
    counted = torch.tensor(6)
    for _ in range(2):
        bn_finalize(partials_of(torch.randn(30, K, dtype=dtype), [30]), Norm(counted=counted))
    assert counted.dtype == torch.int64
    assert counted.item() == 8


def test_bias_moves_nothing_but_the_running_mean(each_backend):
    partials = partials_of(torch.randn(30, K, dtype=torch.float64), [30])
    bias, means = torch.randn(K, dtype=torch.float64), [torch.zeros(K, dtype=torch.float64) for _ in range(2)]
    variances = [torch.ones(K, dtype=torch.float64) for _ in range(2)]
    without = bn_finalize(partials, Norm(None, None, means[0], variances[0]))
    with_bias = bn_finalize(partials, Norm(None, None, means[1], variances[1], bias))
    assert all(torch.equal(a, b) for a, b in zip(without[:4], with_bias[:4], strict=True))
    assert torch.equal(*variances)
    assert_close(means[1] - means[0], 0.1 * bias)


def test_low_precision_parameters_and_running_statistics(each_backend):
    rows = torch.randn(64, K) + 2
    gamma, beta = torch.randn(K).bfloat16(), torch.randn(K).bfloat16()
    running_mean, running_var = torch.zeros(K).bfloat16(), torch.ones(K).bfloat16()
    norm = bn_finalize(partials_of(rows, [64]), Norm(gamma, beta, running_mean, running_var))
    assert {part.dtype for part in norm.vectors.values()} == {torch.float32}
    exact = gamma.double() * (rows.double().var(0, correction=0) + 1e-5) ** -0.5
    assert_close(norm.scale, exact, 1e-6)
    assert running_mean.dtype == torch.bfloat16
    assert_close(running_mean, 0.1 * rows.double().mean(0), 1e-2)
    assert_close(running_var, 0.9 + 0.1 * rows.double().var(0), 1e-2)


@pytest.mark.parametrize("biased", [False, True])
def test_running_statistics_normalise_as_eval_mode_does(biased):
    bn = nn.BatchNorm2d(K, eps=1e-3, dtype=torch.float64).eval()
    for tensor in (bn.weight, bn.bias, bn.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(bn.running_var)
    bias = torch.randn(K, dtype=torch.float64) if biased else None
    stored = Norm(bn.weight, bn.bias, bn.running_mean, bn.running_var, bias, numbers=NormNumbers(1e-3))
    norm = bn_from_running(stored, torch.float64)
    y = torch.randn(2, K, 3, 3, dtype=torch.float64)
    exact = bn(y if bias is None else y + bias[:, None, None])
    assert_close(y * norm.scale[:, None, None] + norm.shift[:, None, None], exact)


@pytest.mark.parametrize("name", ["gamma", "beta", "running_mean", "running_var", "bias"])
def test_wrong_length_is_refused_by_name_and_changes_nothing(name, each_backend):
    arguments = {key: torch.ones(K) for key in ("gamma", "beta", "running_mean", "running_var", "bias")}
    arguments[name] = torch.ones(K + 1)
    with pytest.raises(ValueError, match=rf"{name}: expected shape \({K},\), got \({K + 1},\)"):
        bn_finalize(partials_of(torch.randn(30, K), [30]), Norm(**arguments))
    assert all(torch.equal(vector, torch.ones_like(vector)) for vector in arguments.values())
