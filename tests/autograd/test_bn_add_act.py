"""fusedres.autograd.ends, BNAddAct: the block end on its own, against autograd of plain PyTorch."""

import pytest
import torch
from torch.nn.functional import batch_norm

from fusedres.activation import activation_named
from fusedres.autograd import BNAddAct
from fusedres.autograd.ends import BNAddActSpec
from fusedres.operands import Norm, NormNumbers
from fusedres.runtime.call import Call
from tests.comparison import LOW, assert_as_accurate_as_eager, assert_close

EPS, MOMENTUM = 1e-3, 0.2
NORM = NormNumbers(EPS, MOMENTUM)
FROZEN = NORM._replace(batch_stats=False)
BNS = ("main", "other")


class Block:
    """y, residual and the tensors of two batch norms, in one dtype."""

    def __init__(self, size, residual, dtype=torch.float64, *, affine=True, running=True, gamma=None, other=None):
        def draw(*shape):
            return torch.randn(shape, dtype=torch.float64).to(dtype)

        wide = torch.float64 if dtype == torch.float64 else torch.float32
        k = size[1]
        self.y = draw(*size).requires_grad_()
        self.residual = None if residual == "none" else draw(*size).to(other or dtype).requires_grad_()
        self.norms = []
        for _ in BNS:
            g = 1 + 0.3 * draw(k).to(wide) if gamma is None else torch.full((k,), gamma, dtype=wide)
            self.norms.append(
                Norm(
                    g.requires_grad_() if affine else None,
                    (0.3 * draw(k)).to(wide).requires_grad_() if affine else None,
                    draw(k).to(wide) if running else None,
                    draw(k).to(wide).abs() + 0.5 if running else None,
                )
            )
        self.normalised = residual == "normalised"
        self.dz = draw(*size)

    def to(self, dtype):
        """The same values, wide everywhere where ``dtype`` is fp64."""
        copy = Block.__new__(Block)
        wide = dtype == torch.float64

        def copied(tensor):
            if tensor is None:
                return None
            made = tensor.detach().clone()
            return (made.double() if wide else made).requires_grad_(tensor.requires_grad)

        copy.y, copy.residual, copy.dz = copied(self.y), copied(self.residual), copied(self.dz)
        copy.norms = [Norm(*map(copied, norm.tensors)) for norm in self.norms]
        copy.normalised = self.normalised
        return copy

    @property
    def leaves(self):
        named = {"y": self.y, "residual": self.residual}
        for name, norm in zip(BNS, self.norms, strict=True):
            if name == "main" or self.normalised:
                named |= {f"{name}.gamma": norm.gamma, f"{name}.beta": norm.beta}
        return {name: leaf for name, leaf in named.items() if leaf is not None}

    @property
    def running(self):
        return [t for norm in self.norms for t in (norm.running_mean, norm.running_var) if t is not None]

    def fused(self, norm=NORM, other=NORM, act="relu"):
        other_spec = other if self.normalised else None
        tensors = [*self.norms[0].tensors, *(self.norms[1] if self.normalised else Norm()).tensors]
        call = Call.on(self.y, (self.residual, *tensors))
        spec = BNAddActSpec(call, norm, other_spec, activation_named(act))
        return BNAddAct.apply(self.y, self.residual, spec, *tensors)

    def eager(self, norm=NORM, other=NORM, act="relu"):
        def normed(y, tensors, spec):
            gamma, beta, mean, var, *_ = tensors
            return batch_norm(y, mean, var, gamma, beta, spec.batch_stats, spec.momentum, spec.eps)

        z = normed(self.y, self.norms[0], norm)
        if self.residual is not None:
            z = z + (normed(self.residual, self.norms[1], other) if self.normalised else self.residual)
        return activation_named(act).value(z)

    def gradients(self, z):
        wanted = {name: leaf for name, leaf in self.leaves.items() if leaf.requires_grad}
        return dict(zip(wanted, torch.autograd.grad(z, list(wanted.values()), self.dz.to(z.dtype)), strict=True))


SIZE = (2, 5, 4, 3)
RESIDUALS = ("none", "plain", "normalised")


def assert_same(ours, plain, **spec):
    z, exact = ours.fused(**spec), plain.eager(**spec)
    assert_close(z, exact, 1e-10)
    expected = plain.gradients(exact)
    for name, gradient in ours.gradients(z).items():
        assert_close(gradient, expected[name], 1e-10, name=name)
    for running, moved in zip(ours.running, plain.running, strict=True):
        assert_close(running, moved, 1e-12)


@pytest.mark.parametrize("act", ["relu", None])
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("size", [SIZE, (1, 3, 7, 5), (6, 4, 1, 1), (2, 1, 3, 3), (2, 9, 4, 4)])
def test_is_autograd_of_plain_pytorch(size, residual, act, each_backend):
    ours = Block(size, residual)
    assert_same(ours, ours.to(torch.float64), act=act)


VARIANTS = {
    "frozen": ({}, {"norm": FROZEN, "other": FROZEN}),
    "main frozen": ({}, {"norm": FROZEN}),
    "other frozen": ({}, {"other": FROZEN}),
    "not affine": ({"affine": False}, {}),
    "not affine, frozen": ({"affine": False}, {"norm": FROZEN, "other": FROZEN}),
    "no running statistics": ({"running": False}, {}),
    "gamma = 0": ({"gamma": 0.0}, {}),
    "gamma < 0": ({"gamma": -1.5}, {}),
}


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_batch_norm(variant, residual, each_backend):
    made, spec = VARIANTS[variant]
    ours = Block(SIZE, residual, **made)
    assert_same(ours, ours.to(torch.float64), **spec)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_any_one_leaf_alone_or_missing(residual, each_backend):
    plain = Block(SIZE, residual)
    exact = plain.gradients(plain.eager())
    for chosen in exact:
        for alone in (True, False):
            ours = plain.to(torch.float64)
            for name, leaf in ours.leaves.items():
                leaf.requires_grad_((name == chosen) is alone)
            ours.fused().backward(ours.dz)
            for name, leaf in ours.leaves.items():
                if leaf.requires_grad:
                    assert_close(leaf.grad, exact[name], 1e-10, name=name)
                else:
                    assert leaf.grad is None


@pytest.mark.parametrize("residual", RESIDUALS)
def test_gradcheck(residual):
    def margin(block):
        with torch.no_grad():
            return float(block.eager(act=None).abs().min())

    block = max((Block((2, 2, 2, 3), residual, running=False) for _ in range(30)), key=margin)
    assert margin(block) > 1e-2
    spec = BNAddActSpec(Call(torch.float64), NORM, NORM if block.normalised else None)
    tensors = [*block.norms[0].tensors, *(block.norms[1] if block.normalised else Norm()).tensors]
    assert torch.autograd.gradcheck(
        lambda y, r, *rest: BNAddAct.apply(y, r, spec, *rest), (block.y, block.residual, *tensors), nondet_tol=0.0
    )


@pytest.mark.parametrize("residual", RESIDUALS)
def test_layouts_and_expanded_gradients(residual, each_backend):
    plain = Block(SIZE, residual)
    (plain.eager().mean() * 100).backward()
    for layout in (torch.contiguous_format, torch.channels_last):
        ours = plain.to(torch.float64)
        ours.y = ours.y.detach().contiguous(memory_format=layout).requires_grad_()
        (ours.fused().mean() * 100).backward()
        for name, leaf in ours.leaves.items():
            assert_close(leaf.grad, plain.leaves[name].grad, 1e-10, name=name)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_two_forward_passes_before_one_backward_pass(residual, each_backend):
    ours = Block(SIZE, residual)
    plain = ours.to(torch.float64)
    gradients = []
    for block, run in ((ours, ours.fused), (plain, plain.eager)):
        gradients.append(block.gradients(run() + 0.5 * run()))
    for name in gradients[0]:
        assert_close(gradients[0][name], gradients[1][name], 1e-10, name=name)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_saves_raw_tensors_and_bits_alone(residual, each_backend):
    block = Block(SIZE, residual)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        z = block.fused()
    of_its_size = [t for t in saved if t.shape == z.shape and t.dtype.is_floating_point]
    wide = [t for t in of_its_size if t.untyped_storage().nbytes() >= z.numel() * z.element_size()]
    assert len(wide) == (2 if residual == "normalised" else 1), "y, and a residual that has a batch norm of its own"
    assert [t.shape for t in saved if t.dtype == torch.uint8] == [(2, 4, 3, 1)]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("other", ["same", "fp32 residual"])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_sixteen_bits_are_as_accurate_as_eager(residual, other, dtype, each_backend):
    if other != "same" and residual != "plain":
        pytest.skip("only a residual that joins as it is promotes the sum")
    ours = Block((4, 16, 9, 7), residual, dtype, other=torch.float32 if other != "same" else None)
    with torch.no_grad():
        # Away from the kinks, where rounding flips a ReLU for one and not for the other.
        clear = ours.to(torch.float64).eager(act=None).abs() > 0.1
    ours.dz = ours.dz * clear
    plain, exact = ours.to(dtype), ours.to(torch.float64)
    results = []
    for block, run in ((ours, ours.fused), (plain, plain.eager), (exact, exact.eager)):
        z = run()
        results.append({"z": z, **block.gradients(z)})
    for name in results[2]:
        floor = 1e-6 if name.startswith(BNS) else None
        assert_as_accurate_as_eager(*(result[name] for result in results), floor=floor, name=name)


def test_same_input_gives_the_same_bits(each_backend):
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        block = Block((4, 16, 9, 7), "normalised", torch.float32)
        z = block.fused()
        runs.append({"z": z, **block.gradients(z)})
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
