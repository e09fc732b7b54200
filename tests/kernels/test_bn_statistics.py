"""fusedres.kernels.bn_statistics and bn_finalize, compiled and executed: from activations to a `Normaliser`."""

from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn.functional import batch_norm

from fusedres.operands import Norm, Normaliser, NormNumbers, Partials
from fusedres.ops.bn_finalize import bn_finalize, bn_from_running
from fusedres.ops.bn_forward import bn_forward
from fusedres.ops.bn_statistics import bn_statistics
from fusedres.ops.rows import pixels
from fusedres.plan.tiles import pinned, reduction_tiles
from tests.budgets import held_to
from tests.comparison import assert_as_accurate_as_eager, assert_close
from tests.kernels.executed import MEASURABLE, SIZES, TESTED, activation, covering, executed
from tests.kernels.on_device import emulated_only

each_target = pytest.mark.parametrize("target", TESTED)


def check_statistics(target: str, y: Tensor) -> Partials:
    """The partials of the kernel, together, against fp64."""
    partials, trace = executed(target, lambda: bn_statistics(y))
    assert trace.by_kernel() == {"bn_statistics_kernel": 1}
    counts, means, m2 = (tensor.double() for tensor in partials)
    assert counts.sum() == pixels(y)
    mean = counts @ means / pixels(y)
    var = (m2.sum(0) + counts @ (means - mean).square()) / pixels(y)
    eager_var, eager_mean = torch.var_mean(y.float(), (0, 2, 3), correction=0)
    exact_var, exact_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    assert_as_accurate_as_eager(mean.float(), eager_mean, exact_mean)
    assert_as_accurate_as_eager(var.float(), eager_var, exact_var)
    return partials


@pytest.mark.parametrize(("case", "target", "dtype"), covering(SIZES))
def test_statistics(case: str, target: str, dtype: torch.dtype) -> None:
    check_statistics(target, activation(SIZES[case], dtype, mean=1.0))


@pytest.mark.parametrize(("case", "target", "dtype"), covering(["many tiles of rows, the last one short", "odd C"]))
@pytest.mark.parametrize("programs", [1, 5])
def test_parts_of_several_tiles(case: str, target: str, dtype: torch.dtype, programs: int) -> None:
    with patch("fusedres.plan.tiles.PROGRAMS", programs):
        partials = check_statistics(target, activation(SIZES[case], dtype, mean=1.0))
    assert len(partials.counts) <= programs


@pytest.mark.parametrize(("case", "target", "dtype"), covering(["8 divides C", "a row is several pieces", "odd C"]))
def test_every_tile(case: str, target: str, dtype: torch.dtype) -> None:
    size = SIZES[case]
    for tile in reduction_tiles(size[0] * size[2] * size[3], size[1]):
        with pinned(tile), patch("fusedres.plan.tiles.PROGRAMS", 2):
            check_statistics(target, activation(size, dtype))


@emulated_only
@each_target
def test_few_bank_conflicts(target: str) -> None:
    """An H100's memory delivers a sector to each multiprocessor in 2.4 cycles and a conflict costs one: at most 5 %."""
    y = activation(SIZES["many tiles of rows, the last one short"], torch.bfloat16)
    with patch("fusedres.plan.tiles.PROGRAMS", 2):
        _, trace = executed(target, lambda: bn_statistics(y))
    counters = trace.launches[0].counters
    sectors = sum(traffic.sectors for traffic in counters.arguments.values())
    assert counters.bank_conflicts <= held_to(0.05, "bank conflicts of statistics") * 2.4 * sectors


@each_target
@pytest.mark.parametrize("first", [0.0, 1000.0], ids=["like the others", "an outlier"])
def test_large_means_do_not_cancel(target: str, first: float) -> None:
    """|mean| / std = 500. The deviations are taken from a value near the mean even if the first one is not."""
    y = activation((2, 8, 23, 29), torch.float32, mean=500.0)
    y[0, :, 0, 0] += first
    with patch("fusedres.plan.tiles.PROGRAMS", 2):
        partials, _ = executed(target, lambda: bn_statistics(y))
        norm, _ = executed(target, lambda: bn_finalize(partials, Norm(numbers=NormNumbers(0.0))))
    exact = torch.var(y.double(), (0, 2, 3), correction=0)
    assert ((norm.invstd.double().pow(-2) - exact).abs() <= 1e-5 * exact).all()


@each_target
def test_equal_values_have_no_variance(target: str) -> None:
    y = torch.full((2, 8, 5, 5), 0.1).contiguous(memory_format=torch.channels_last)
    partials, _ = executed(target, lambda: bn_statistics(y))
    assert (partials.m2 == 0).all()


class Finalize(NamedTuple):
    """Channels and what beside the partials `bn_finalize` is given."""

    channels: int = 64
    parts: int = 7
    affine: bool = True
    running: bool = True
    bias: bool = False
    momentum: float = 0.1
    eps: float = 1e-5
    parameters: torch.dtype = torch.float32


FINALIZE = {
    "a layer of ResNet-50": Finalize(),
    "more parts than are taken at a time": Finalize(parts=300),
    "one part": Finalize(parts=1),
    "tail of the channels": Finalize(channels=40),
    "odd C": Finalize(channels=33),
    "one channel": Finalize(channels=1),
    "wide": Finalize(channels=2048, parts=3),
    "affine=False": Finalize(affine=False),
    "track_running_stats=False": Finalize(running=False),
    "the convolution has a bias": Finalize(bias=True),
    "a bias that nobody sees": Finalize(bias=True, running=False),
    "cumulative average, first batch": Finalize(momentum=1.0),
    "frozen running statistics": Finalize(momentum=0.0),
    "heavy momentum, large eps": Finalize(momentum=0.9, eps=1e-3),
    "16-bit module": Finalize(parameters=torch.bfloat16),
}


def finalize_operands(case: Finalize) -> tuple[Partials, list[Tensor | None], list[Tensor]]:
    """Partials; gamma, beta, bias or None each; the running statistics, if any."""
    shape = (case.parts, case.channels)
    partials = Partials(torch.randint(1, 99, (case.parts,)).float() + 1, torch.randn(shape) + 3, 50 * torch.rand(shape))
    gamma, beta, bias, mean, var = torch.randn(5, case.channels).to(case.parameters)
    vectors = [gamma if case.affine else None, beta if case.affine else None, bias if case.bias else None]
    return partials, vectors, [mean.clone(), var.abs()] if case.running else []


@pytest.mark.parametrize("case", FINALIZE)
@each_target
def test_finalize(case: str, target: str) -> None:
    spec = FINALIZE[case]
    partials, (gamma, beta, bias), running = finalize_operands(spec)

    numbers = NormNumbers(spec.eps, spec.momentum)

    def result(dtype: torch.dtype, running: list[Tensor]) -> Normaliser:
        def cast(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(dtype)

        norm = Norm(cast(gamma), cast(beta), *(running or (None, None)), cast(bias), numbers=numbers)
        return bn_finalize.reference(Partials(*map(cast, partials)), norm)

    counted = torch.tensor(2**40) if spec.running else None
    exact_running, eager_running = [tensor.double() for tensor in running], [tensor.clone() for tensor in running]
    exact, eager = result(torch.float64, exact_running), result(torch.float32, eager_running)
    stored = Norm(gamma, beta, *(running or (None, None)), bias, counted, numbers)
    updated = running if counted is None else [*running, counted]
    norm, trace = executed(target, lambda: bn_finalize(partials, stored), updated)
    assert counted is None or counted.item() == 2**40 + 1
    assert trace.by_kernel() == {"bn_finalize_kernel": 1}
    for name, ours, theirs, truth in zip(norm.vectors, norm[:4], eager[:4], exact[:4], strict=True):
        assert_as_accurate_as_eager(ours, theirs, truth, name=name)
    for ours, theirs, truth in zip(running, eager_running, exact_running, strict=True):
        assert_as_accurate_as_eager(ours, theirs, truth, name="running statistics")


@each_target
def test_partials_far_apart_do_not_cancel(target: str) -> None:
    """The parts' means differ by a thousandth of the mean, and lie thousands of their deviations away from zero."""
    means = 1000 + torch.randn(20, 8)
    partials = Partials(torch.full((20,), 50.0), means, torch.rand(20, 8))
    norm, _ = executed(target, lambda: bn_finalize(partials, Norm(numbers=NormNumbers(0.0))))
    exact = bn_finalize.reference(Partials(*(tensor.double() for tensor in partials)), Norm(numbers=NormNumbers(0.0)))
    assert_close(norm.invstd, exact.invstd, 1e-6)


@pytest.mark.parametrize(("case", "target", "dtype"), covering(MEASURABLE))
def test_batch_norm_as_a_whole(case: str, target: str, dtype: torch.dtype) -> None:
    """Statistics, numbers, running statistics and activation, against `torch.nn.functional.batch_norm`."""
    size = MEASURABLE[case]
    y, residual = activation(size, dtype, mean=0.5), activation(size, dtype)
    gamma, beta = torch.rand(size[1]) + 0.5, torch.randn(size[1])
    running = [torch.randn(size[1]), torch.rand(size[1])]

    def eager(dtype: torch.dtype, statistics: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        moved = [tensor.to(statistics, copy=True) for tensor in running]
        z = batch_norm(y.to(dtype), *moved, gamma.to(statistics), beta.to(statistics), training=True)
        return torch.relu(z + residual.to(dtype)), moved

    exact, exact_running = eager(torch.float64, torch.float64)
    theirs, their_running = eager(dtype, torch.float32)
    (z, _, _), trace = executed(
        target, lambda: bn_forward(y, Norm(gamma, beta, *running), residual=residual, bit_mask=True), running
    )
    assert trace.by_kernel() == {"bn_statistics_kernel": 1, "bn_finalize_kernel": 1, "bn_act_kernel": 1}
    assert_as_accurate_as_eager(z, theirs, exact)
    for ours, other, truth in zip(running, their_running, exact_running, strict=True):
        assert_as_accurate_as_eager(ours, other, truth)


@each_target
def test_what_is_not_finite_stays_in_its_channel(target: str) -> None:
    y = activation((2, 8, 5, 5), torch.float32)
    y[0, 2, 0, 0], y[1, 5, 3, 3] = float("nan"), float("inf")
    partials, _ = executed(target, lambda: bn_statistics(y))
    norm, _ = executed(target, lambda: bn_finalize(partials, Norm()))
    bad = torch.tensor([False, False, True, False, False, True, False, False])
    assert torch.equal(norm.invstd.isnan(), bad)


@pytest.mark.parametrize("target", TESTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 24, 130])
def test_numbers_of_running_statistics(channels: int, dtype: torch.dtype, target: str) -> None:
    mean, gamma, beta, bias = (torch.randn(channels).to(dtype) for _ in range(4))
    var = (torch.rand(channels) + 0.1).to(dtype)
    whole = Norm(gamma, beta, mean, var, bias, numbers=NormNumbers(1e-3))
    for norm in (whole, Norm(None, None, mean, var, numbers=NormNumbers(0.0))):
        numbers, trace = executed(target, lambda norm=norm: bn_from_running(norm))
        assert trace.by_kernel() == {"bn_running_kernel": 1}
        exact = bn_from_running.reference(norm, torch.float64)
        for name, ours, theirs in zip(numbers.vectors, numbers[:4], exact[:4], strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6, msg=name)
