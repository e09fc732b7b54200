"""fusedres.kernels.input_moments, compiled and executed: mean and Gram matrix of a 1x1 convolution's input."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from fusedres.operands import ConvInput, Moments
from fusedres.ops.input_moments import input_moments
from tests.comparison import relative_error
from tests.kernels.convolutions import one_by_one
from tests.kernels.executed import TESTED, Size, activation, covering, executed

CASES: dict[str, tuple[Size, tuple[int, int]]] = {
    "first stage of a bottleneck network": ((2, 64, 9, 9), (1, 1)),
    "several pieces": ((1, 256, 7, 9), (1, 1)),
    "strided": ((2, 64, 7, 8), (2, 2)),
    "stride 2 by 1": ((1, 32, 6, 7), (2, 1)),
    "tail of the channels": ((1, 72, 8, 9), (1, 1)),
    "8 divides C": ((1, 40, 7, 7), (1, 1)),
    "odd C": ((1, 33, 6, 6), (1, 1)),
    "few channels": ((1, 8, 9, 9), (1, 1)),
    "one channel": ((1, 1, 9, 9), (1, 1)),
    "one pixel": ((1, 64, 1, 1), (1, 1)),
    "many parts": ((3, 64, 17, 15), (1, 1)),
    "C is not a multiple of the piece, and odd pieces": ((1, 144, 5, 5), (1, 1)),
}


def moments(u: Tensor) -> Moments:
    """By the definition, in the dtype of ``u`` (pixels, C)."""
    mean = u.mean(0)
    return Moments(len(u), mean, (u - mean).T @ (u - mean))


def check(target: str, x: Tensor, stride: tuple[int, int], *, prologue: bool) -> None:
    channels = x.shape[1]
    scale, shift = (torch.rand(channels) + 0.5, torch.randn(channels)) if prologue else (None, None)
    got, trace = executed(target, lambda: input_moments(ConvInput(x, scale, shift), stride))
    assert trace.by_kernel() == {"input_moments_kernel": 1, "input_moments_finish_kernel": 1}
    u = x[:, :, :: stride[0], :: stride[1]]
    if scale is not None and shift is not None:
        u = torch.relu(torch.addcmul(shift.view(1, -1, 1, 1), u.float(), scale.view(1, -1, 1, 1))).to(x.dtype)
    rows = u.permute(0, 2, 3, 1).reshape(-1, channels)
    exact = moments(rows.double())
    assert got.pixels == exact.pixels
    # The input is exact in both; what it is multiplied in rounds the differences from the reference row.
    dtype = x.dtype
    t = rows.float() - rows[:64].float().mean(0)
    rounded = t.to(dtype).float()
    eager = moments(rounded)
    # Squares only grow, and a channel or two may hold most of them: a walk of whole half units, not of their average.
    walk = 12**0.5 * one_by_one(len(rows))
    allowed = max(1.5 * max(relative_error(eager.m2, exact.m2), walk), 4 * torch.finfo(torch.float32).eps)
    error = relative_error(got.m2, exact.m2)
    assert error <= allowed, f"m2: relative error {error:.2e}, allowed {allowed:.2e}"
    scale_ = float(rows.double().norm(dim=0).norm()) / len(rows) ** 0.5
    mean_error = relative_error(eager.mean + (rows.float() - t).mean(0), exact.mean, scale_)
    assert relative_error(got.mean, exact.mean, scale_) <= max(1.5 * mean_error, 4 * torch.finfo(torch.float32).eps)
    assert torch.equal(got.m2, got.m2.T)


@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
@pytest.mark.parametrize(("case", "target", "dtype"), covering(CASES, contraction=True))
def test_agrees(case: str, target: str, dtype: torch.dtype, prologue: bool) -> None:
    size, stride = CASES[case]
    check(target, activation(size, dtype, mean=0.5), stride, prologue=prologue)


@pytest.mark.parametrize(("programs", "target", "dtype"), covering([2, 10], contraction=True))
def test_parts_of_several_steps(programs: int, target: str, dtype: torch.dtype) -> None:
    with patch("fusedres.plan.tiles.PROGRAMS", programs):
        check(target, activation((3, 72, 17, 15), dtype), (1, 1), prologue=True)


@pytest.mark.parametrize("target", TESTED)
def test_large_means_do_not_cancel(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """|mean| / std = 500."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    x = activation((2, 16, 17, 15), torch.float32, mean=500.0)
    got, _ = executed(target, lambda: input_moments(ConvInput(x)))
    exact = moments(x.double().permute(0, 2, 3, 1).reshape(-1, 16))
    assert relative_error(got.m2, exact.m2) <= 1e-5
    assert relative_error(got.mean, exact.mean) <= 1e-6
