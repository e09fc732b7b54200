"""fusedres.kernels.bn_prelu, compiled and executed: forward, the sums, the gradient at the input."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn.functional import prelu

from fusedres.operands import Normaliser
from fusedres.ops.bn_prelu import bn_prelu, bn_prelu_backward
from tests.comparison import assert_as_accurate_as_eager, relative_error
from tests.kernels.executed import MEASURABLE, SIZES, Size, activation, covering, executed

EPS = 1e-5
BACKWARD = ("bn_prelu_reduce_kernel", "bn_backward_finish_kernel", "bn_prelu_apply_kernel")


class Operands:
    """A batch norm with its PReLU behind, and a gradient that arrives there."""

    def __init__(self, size: Size, dtype: torch.dtype, slopes: int, slope_dtype: torch.dtype = torch.float32) -> None:
        self.y, self.g = activation(size, dtype, mean=0.5), activation(size, dtype, mean=0.1)
        self.gamma, self.beta = torch.rand(size[1]) + 0.5, 0.3 * torch.randn(size[1])
        self.slope = torch.randn(slopes).to(slope_dtype)

    def norm(self, dtype: torch.dtype) -> Normaliser:
        var, mean = torch.var_mean(self.y.to(dtype), (0, 2, 3), correction=0)
        invstd = torch.rsqrt(var + EPS)
        scale = invstd * self.gamma.to(dtype)
        return Normaliser(mean, invstd, scale, self.beta.to(dtype) - mean * scale)

    def eager(self, dtype: torch.dtype, wide: torch.dtype, batch_stats: bool) -> tuple[list[Tensor], list[Tensor]]:
        """z, dy, dgamma, dbeta, dslope, the PReLU's input rounded to ``dtype``; and what the last three are sums of."""
        norm, y, g = self.norm(wide), self.y.to(dtype), self.g.to(dtype)
        v = (y.to(wide) * norm.scale.view(-1, 1, 1) + norm.shift.view(-1, 1, 1)).to(dtype).requires_grad_()
        slope = self.slope.to(wide).requires_grad_()
        z = prelu(v.to(wide), slope)
        h, dslope = torch.autograd.grad(z, (v, slope), g.to(wide))
        normalised = (y.to(wide) - norm.mean.view(-1, 1, 1)) * norm.invstd.view(-1, 1, 1)
        terms = [h.to(wide) * normalised, h.to(wide), g.to(wide) * v.detach().to(wide).clamp(max=0)]
        dy, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
            h, y, self.gamma.to(wide), *norm[:2], *norm[:2], True, EPS, [True] * 3
        )
        if not batch_stats:
            dy = (h.to(wide) * norm.scale.view(-1, 1, 1)).to(dtype)
        return [z.detach().to(dtype), dy, dgamma, dbeta, dslope], terms


def check(
    target: str, size: Size, dtype: torch.dtype, slopes: int, *, batch_stats: bool = True,
    slope_dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    operands = Operands(size, dtype, slopes, slope_dtype)
    norm, y, slope = operands.norm(torch.float32), operands.y, operands.slope
    z, trace = executed(target, lambda: bn_prelu(y, norm.scale, norm.shift, slope))
    assert trace.by_kernel() == {"bn_prelu_kernel": 1}
    grads, trace = executed(
        target, lambda: bn_prelu_backward(operands.g, y, norm, slope, operands.gamma, batch_stats=batch_stats)
    )
    assert trace.by_kernel() == dict.fromkeys(BACKWARD, 1)
    theirs, _ = operands.eager(dtype, torch.float32, batch_stats)
    exact, terms = operands.eager(torch.float64, torch.float64, batch_stats)
    for name, ours in (("z", z), ("dy", grads[0])):
        assert_as_accurate_as_eager(ours, theirs.pop(0).to(dtype), exact.pop(0), name=name)
    # A sum that cancels more than terms of random signs do is measured by these.
    for ours, eagers, truth, summed in zip(grads[1:], theirs, exact, terms, strict=True):
        scale = max(float(truth.norm()), float(summed.norm()))
        error, allowed = relative_error(ours, truth, scale), 1.5 * relative_error(eagers, truth, scale)
        assert error <= max(allowed, 4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize(("case", "target", "dtype"), covering(MEASURABLE))
def test_agrees(case: str, target: str, dtype: torch.dtype) -> None:
    check(target, MEASURABLE[case], dtype, MEASURABLE[case][1])


@pytest.mark.parametrize(("case", "target", "dtype"), covering(["8 divides C", "odd C", "one channel"], offset=1))
def test_one_slope_for_all_channels(case: str, target: str, dtype: torch.dtype) -> None:
    check(target, SIZES[case], dtype, 1)


@pytest.mark.parametrize(("case", "target", "dtype"), covering(["8 divides C", "odd C"], offset=2))
def test_statistics_that_are_constants(case: str, target: str, dtype: torch.dtype) -> None:
    check(target, SIZES[case], dtype, SIZES[case][1], batch_stats=False)


@pytest.mark.parametrize(("slope_dtype", "target", "dtype"), covering([torch.bfloat16, torch.float16], offset=3))
def test_slopes_of_another_dtype(slope_dtype: torch.dtype, target: str, dtype: torch.dtype) -> None:
    check(target, SIZES["8 divides C"], dtype, 40, slope_dtype=slope_dtype)


@pytest.mark.parametrize(("case", "target", "dtype"), covering(["many tiles of rows, the last one short", "odd C"]))
def test_parts_of_several_tiles(case: str, target: str, dtype: torch.dtype) -> None:
    with patch("fusedres.plan.tiles.PROGRAMS", 3):
        check(target, SIZES[case], dtype, SIZES[case][1])


@pytest.mark.parametrize(("case", "target", "dtype"), covering(["8 divides C"]))
def test_a_nan_stays_one(case: str, target: str, dtype: torch.dtype) -> None:
    operands = Operands(SIZES[case], dtype, SIZES[case][1])
    norm = operands.norm(torch.float32)
    operands.y[0, 3, 0, 0] = float("nan")
    z, _ = executed(target, lambda: bn_prelu(operands.y, norm.scale, norm.shift, operands.slope))
    assert z.isnan().sum() == 1 and z[0, 3, 0, 0].isnan()
