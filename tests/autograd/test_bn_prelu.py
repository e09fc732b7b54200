"""fusedres.autograd.ends, BNPReLU, and its doors: against autograd of plain PyTorch."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import batch_norm, prelu

import fusedres
from fusedres.functional import bn_prelu
from tests.autograd.test_composed import assert_same, twice
from tests.comparison import assert_as_accurate_as_eager, relative_error
from tests.vgpu_support import needs_vgpu

SIZE = (3, 6, 5, 4)
SLOPES = pytest.mark.parametrize("slopes", [1, 6], ids=["one slope", "one for each channel"])
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["batch", "running"])
NAMES = ("x", "gamma", "beta", "slope")


class Operands:
    def __init__(self, slopes: int, dtype: torch.dtype = torch.float64, affine: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)

        def drawn(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

        self.x, self.dz = drawn(*SIZE).contiguous(memory_format=torch.channels_last), drawn(*SIZE)
        self.gamma, self.beta = (drawn(6), drawn(6)) if affine else (None, None)
        self.slope, self.mean, self.var = drawn(slopes), drawn(6), drawn(6).square() + 0.5
        self.leaves = [t.requires_grad_() for t in (self.x, self.gamma, self.beta, self.slope) if t is not None]

    def ours(self, training: bool) -> torch.Tensor:
        return bn_prelu(self.x, self.gamma, self.beta, self.mean, self.var, self.slope, training=training)

    def plain(self, training: bool) -> torch.Tensor:
        z = batch_norm(self.x, self.mean, self.var, self.gamma, self.beta, training)
        return prelu(z, self.slope)


@SLOPES
@TRAINING
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "not affine"])
def test_outputs_gradients_and_running_statistics(affine, training, slopes, each_backend):
    found = []
    for run in (Operands.ours, Operands.plain):
        operands = Operands(slopes, affine=affine)
        z = run(operands, training)
        grads = torch.autograd.grad(z, operands.leaves, operands.dz)
        found.append([z, *grads, operands.mean, operands.var])
    assert_same(*found, 1e-12)


@SLOPES
@TRAINING
def test_second_derivatives(training, slopes, each_backend):
    found = []
    for run in (Operands.ours, Operands.plain):
        operands = Operands(slopes)
        found.append(twice(run(operands, training), operands.leaves, operands.dz))
    assert_same(*found, 1e-9)


@SLOPES
def test_gradcheck(slopes):
    operands = Operands(slopes)
    none = (None, None)
    assert gradcheck(
        lambda x, gamma, beta, slope: bn_prelu(x, gamma, beta, *none, slope, training=True), operands.leaves,
        nondet_tol=0.0,
    )  # fmt: skip


@SLOPES
@TRAINING
@needs_vgpu
def test_on_kernels(training, slopes):
    found = []
    for run, dtype in ((Operands.ours, torch.float32), (Operands.plain, torch.float32), (Operands.plain, None)):
        operands = Operands(slopes, dtype or torch.float64)
        with fusedres.backend("vgpu:sm_90"), fusedres.record() as trace:
            z = run(operands, training)
            found.append([z, *torch.autograd.grad(z, operands.leaves, operands.dz)])
        assert bool(trace.launches) == (run is Operands.ours)
    *found, slope = zip(*found, strict=True)
    for name, (ours, theirs, exact) in zip(("z", "x", "gamma", "beta"), found, strict=True):
        assert_as_accurate_as_eager(ours, theirs, exact, name=name)
    # Of a sum that all but cancels: it is measured by what was summed.
    with torch.no_grad():
        exact = Operands(slopes)
        v = batch_norm(exact.x, exact.mean, exact.var, exact.gamma, exact.beta, training)
        summed = float((exact.dz * v.clamp(max=0)).abs().sum())
    error, eager = (relative_error(of, slope[2], summed) for of in slope[:2])
    assert error <= max(1.5 * eager, 4 * torch.finfo(torch.float32).eps)


def test_nothing_but_the_input_is_kept():
    operands, sizes = Operands(6), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        operands.ours(training=True)
    assert [size for size in sizes if size > 6] == [operands.x.numel()]


def test_gradients_that_nobody_asks_for_are_not_given():
    operands = Operands(6)
    operands.slope.requires_grad_(False)
    operands.gamma.requires_grad_(False)
    operands.ours(training=True).sum().backward()
    assert operands.slope.grad is None and operands.gamma.grad is None and operands.beta.grad is not None


def test_under_autocast_slopes_may_be_fp32():
    operands, exact = Operands(6, torch.float32), Operands(6)
    low = operands.x.detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = bn_prelu(low, operands.gamma, operands.beta, operands.mean, operands.var, operands.slope, training=True)
        z.float().mul(operands.dz).sum().backward()
    expected = exact.plain(training=True)
    (dslope,) = torch.autograd.grad(expected, exact.slope, exact.dz)
    assert z.dtype == torch.bfloat16 and operands.slope.grad.dtype == torch.float32
    assert relative_error(z, expected) < 2**-8 and relative_error(operands.slope.grad, dslope) < 2**-7


BAD = {
    "slopes of another number": ({"slope": torch.ones(5).double()}, ValueError, r"slope: .*\(6,\).*\(5,\)"),
    "slopes of another dtype": ({"slope": torch.ones(6)}, TypeError, "slope: .*float64.*float32"),
    "gamma of another length": ({"gamma": torch.ones(5).double()}, ValueError, r"gamma: .*\(6,\).*\(5,\)"),
    "mean without variance": ({"running_var": None}, ValueError, "running_mean, running_var: .*both"),
    "negative eps": ({"eps": -1.0}, ValueError, "eps of x: .*at least 0, got -1"),
    "3-D": ({"x": torch.ones(6, 5, 4).double()}, ValueError, "x: .*4-D"),
    "one value per channel": ({"x": torch.ones(1, 6, 1, 1).double()}, ValueError, "x: .*more than 1 value"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_refuses(change, error, message):
    operands = Operands(6)
    arguments = {
        "x": operands.x, "gamma": operands.gamma, "beta": operands.beta, "running_mean": operands.mean,
        "running_var": operands.var, "slope": operands.slope, "training": True,
    }  # fmt: skip
    before = operands.mean.clone(), operands.var.clone()
    with pytest.raises(error, match=message):
        bn_prelu(**{**arguments, **change})
    assert torch.equal(operands.mean, before[0]) and torch.equal(operands.var, before[1])
