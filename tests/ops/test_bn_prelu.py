"""fusedres.ops.bn_prelu: the formula and its gradients, against autograd of plain PyTorch."""

import pytest
import torch
from torch.nn.functional import batch_norm, prelu

from fusedres.operands import Normaliser
from fusedres.ops.bn_prelu import bn_prelu, bn_prelu_backward
from tests.comparison import LOW, assert_as_accurate_as_eager, assert_close

SIZES = {
    "even": (2, 8, 4, 4),
    "C not a multiple of 8": (3, 5, 7, 3),
    "one channel": (2, 1, 3, 3),
    "wide": (1, 70, 2, 3),
}
SLOPES = {"one slope": lambda channels: 1, "one for each channel": lambda channels: channels}
each_slope = pytest.mark.parametrize("slopes", SLOPES)
EPS = 1e-5


def normaliser(y: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> Normaliser:
    var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    invstd = torch.rsqrt(var + EPS)
    return Normaliser(mean, invstd, gamma * invstd, beta - mean * gamma * invstd)


@each_slope
@pytest.mark.parametrize("batch_stats", [True, False], ids=["batch", "running"])
@pytest.mark.parametrize("case", SIZES)
def test_is_prelu_of_batch_norm_and_its_gradients(case, batch_stats, slopes, each_backend):
    size = SIZES[case]
    y, g = torch.randn(2, *size, dtype=torch.float64)
    y.requires_grad_()
    gamma, beta, mean = torch.randn(3, size[1], dtype=torch.float64).requires_grad_().unbind()
    slope = torch.randn(SLOPES[slopes](size[1]), dtype=torch.float64).requires_grad_()
    var = torch.rand(size[1], dtype=torch.float64) + 0.5
    running = (None, None) if batch_stats else (mean.detach(), var)
    exact = prelu(batch_norm(y, *running, gamma, beta, batch_stats, eps=EPS), slope)
    expected = torch.autograd.grad(exact, (y, gamma, beta, slope), g)
    with torch.no_grad():
        norm = normaliser(y, gamma, beta)
        if not batch_stats:
            invstd = torch.rsqrt(var + EPS)
            norm = Normaliser(mean, invstd, gamma * invstd, beta - mean * gamma * invstd)
        assert_close(bn_prelu(y, norm.scale, norm.shift, slope), exact)
        found = bn_prelu_backward(g, y, norm, slope, gamma, batch_stats=batch_stats)
    for name, ours, theirs in zip(("dy", "dgamma", "dbeta", "dslope"), found, expected, strict=True):
        assert_close(ours, theirs, 1e-11, name=name)


@each_slope
@pytest.mark.parametrize("dtype", LOW)
def test_is_rounded_once(dtype, slopes, each_backend):
    y, slope = torch.randn(3, 6, 5, 4).to(dtype), torch.randn(SLOPES[slopes](6))
    scale, shift = torch.randn(2, 6)
    wide = [tensor.double() for tensor in (y, scale, shift, slope)]
    z = bn_prelu(y, scale, shift, slope)
    exact = bn_prelu.reference(*wide)
    assert torch.equal(z, exact.to(dtype)) or (z != exact.to(dtype)).float().mean() < 0.01
    eager = prelu((y.float() * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).to(dtype), slope.to(dtype))
    assert_as_accurate_as_eager(z, eager, exact)


BAD = {
    "slopes of another number": (torch.ones(5), ValueError, r"slope: expected shape \(6,\), got \(5,\)"),
    "slopes as a matrix": (torch.ones(6, 1), ValueError, r"slope: expected shape \(6,\), got \(6, 1\)"),
    "slopes of integers": (torch.ones(6, dtype=torch.int64), TypeError, "slope: expected a floating-point tensor"),
    "slopes elsewhere": (torch.ones(6, device="meta"), ValueError, "slope: expected it on cpu, got meta"),
    "one slope elsewhere": (torch.ones(1, device="meta"), ValueError, "slope: expected it on cpu, got meta"),
}


@pytest.mark.parametrize(("slope", "error", "message"), BAD.values(), ids=BAD)
def test_refuses(slope, error, message):
    with pytest.raises(error, match=message):
        bn_prelu(torch.ones(2, 6, 1, 1), torch.ones(6), torch.ones(6), slope)
