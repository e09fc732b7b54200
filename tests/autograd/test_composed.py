"""fusedres.autograd.composed: gradients that are differentiated again, against autograd of plain PyTorch in fp64."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradgradcheck
from torch.nn.functional import batch_norm

from fusedres import functional
from fusedres.autograd import Dense, PreAct
from fusedres.autograd.composed import composed_gradients
from fusedres.runtime.backends import backend
from tests.autograd import chains
from tests.autograd import test_dense as dense
from tests.autograd import test_preact as preact
from tests.autograd import test_stem as stem
from tests.autograd.chains import (
    ALL_SCHEDULES,
    CASES,
    PROJECTED,
    Case,
    Conv,
    eager,
    fused,
    gradients,
    moments_forms,
    tensors_of,
)
from tests.autograd.test_bn_add_act import FROZEN, NORM, RESIDUALS, SIZE, VARIANTS, Block
from tests.comparison import assert_as_accurate_as_eager, relative_error

TIGHT = 1e-9
EVERY = pytest.mark.parametrize("schedule", ALL_SCHEDULES)
# One of each shortcut, kind of batch norm and number of layers, for every schedule.
FEW = (
    "basic block",
    "basic block, strided projection, odd size",
    "basic block, zero-pad, odd difference",
    "bottleneck",
    "bottleneck, projection",
    "bottleneck, external residual",
    "bottleneck, frozen statistics, biased",
    "bottleneck, inner statistics frozen",
    "one 3x3, external residual, no ReLU",
    "one 1x1, external residual",
)


def draw(like: Tensor, seed: int = 3) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(like)


def twice(z: Tensor, leaves: list[Tensor], dz: Tensor) -> list[Tensor]:
    """First derivatives in the direction dz, then those of their product with a vector: in the leaves and in dz."""
    dz = dz.detach().clone().requires_grad_()
    first = torch.autograd.grad(z, leaves, dz, create_graph=True)
    product = sum((grad * draw(grad)).sum() for grad in first)
    second = torch.autograd.grad(product, [*leaves, dz], allow_unused=True)
    return [*first, *(torch.zeros_like(to) if s is None else s for to, s in zip([*leaves, dz], second, strict=True))]


def assert_same(ours: list[Tensor], theirs: list[Tensor], tolerance: float = TIGHT) -> None:
    """One that vanishes but for rounding (of a bias before batch norm) is measured against the largest."""
    assert len(ours) == len(theirs)
    largest = max(float(exact.detach().norm()) for exact in theirs)
    for i, (actual, exact) in enumerate(zip(ours, theirs, strict=True)):
        assert actual.dtype == exact.dtype
        scale = max(float(exact.detach().norm()), 1e-3 * largest)
        error = relative_error(actual, exact, scale)
        assert error <= tolerance, f"gradient {i}: relative error {error:.1e}"


def wanted(tensors) -> list[Tensor]:
    return [leaf for leaf in tensors.leaves.values() if leaf.requires_grad]


def check_chain(case: Case, schedule: str, moments: tuple[bool, bool] | None = None) -> None:
    tensors = tensors_of(case)
    plain = tensors.to(torch.float64)
    z = fused(tensors, case, ALL_SCHEDULES[schedule], moments)
    running = {name: value.clone() for name, value in tensors.running.items()}
    ours = twice(z, wanted(tensors), tensors.dz)
    assert_same(ours, twice(eager(plain, case), wanted(plain), plain.dz))
    assert all(torch.equal(value, tensors.running[name]) for name, value in running.items())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_chains(case, each_backend):
    check_chain(case, "block_end")


@EVERY
@pytest.mark.parametrize("case", FEW)
def test_chains_on_every_schedule(case, schedule):
    for moments in moments_forms(CASES[case]):
        check_chain(CASES[case], schedule, moments)


def by_formula(y, mean, var, gamma, beta, training, momentum, eps):
    """PyTorch's batch norm has no third derivative."""
    if training:
        mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
    mean, var, gamma, beta = (vector.view(1, -1, 1, 1) for vector in (mean, var, gamma, beta))
    return (y - mean) / (var + eps).sqrt() * gamma + beta


@pytest.mark.parametrize("case", FEW)
def test_third_derivatives(case, monkeypatch):
    monkeypatch.setattr(chains, "batch_norm", by_formula)
    found = []
    for run in (lambda t, c: fused(t, c, ALL_SCHEDULES["moments"]), eager):
        tensors = tensors_of(CASES[case])
        leaves = wanted(tensors)
        z = run(tensors, CASES[case])
        for seed in range(2):
            grads = torch.autograd.grad(z, leaves, draw(z, seed), create_graph=True, allow_unused=True)
            z = torch.stack([(grad * draw(grad, seed)).sum() for grad in grads if grad is not None])
        third = torch.autograd.grad(z.sum(), leaves, allow_unused=True)
        found.append([torch.zeros_like(leaf) if t is None else t for leaf, t in zip(leaves, third, strict=True)])
    assert_same(*found)


@pytest.mark.parametrize("case", stem.CASES.values(), ids=stem.CASES)
@pytest.mark.parametrize("image", [True, False], ids=["image too", "parameters alone"])
def test_stems(case, image, each_backend):
    found = []
    for run in (lambda *stem_of: stem.fused(*stem_of, "block_end"), stem.plainly):
        tensors = stem.stem_tensors(*case, image=image)
        found.append(twice(run(tensors, *case), wanted(tensors), tensors.dz))
    assert_same(*found)


@EVERY
@pytest.mark.parametrize("case", ["ResNet's", "frozen, biased"])
def test_stems_on_every_schedule(case, schedule):
    found = []
    for run in (lambda *stem_of: stem.fused(*stem_of, schedule), stem.plainly):
        tensors = stem.stem_tensors(*stem.CASES[case], image=False)
        found.append(twice(run(tensors, *stem.CASES[case]), wanted(tensors), tensors.dz))
    assert_same(*found)


@pytest.mark.parametrize("act", ["relu", None])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_block_ends(residual, act, each_backend):
    ours = Block(SIZE, residual)
    plain = ours.to(torch.float64)
    found = []
    for block, run in ((ours, ours.fused), (plain, plain.eager)):
        found.append(twice(run(act=act), list(block.leaves.values()), block.dz))
    assert_same(*found)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_block_ends_of_other_kinds(variant, residual):
    options, spec = VARIANTS[variant]
    ours = Block(SIZE, residual, **options)
    plain = ours.to(torch.float64)
    found = []
    for block, run in ((ours, ours.fused), (plain, plain.eager)):
        found.append(twice(run(**spec), list(block.leaves.values()), block.dz))
    assert_same(*found)


def on_no_kink(check: Callable[[int], bool]) -> None:
    """A step over a ReLU's kink would show, so seeds are tried until none is."""
    for seed in range(6):
        try:
            assert check(seed)
            return
        except GradcheckError as error:
            failure = error
    raise failure


@pytest.mark.parametrize("tiny", preact.TINY.values(), ids=preact.TINY)
@pytest.mark.parametrize("schedule", ["block_end", "prologue"])
def test_gradgradcheck_of_preactivation(tiny, schedule):
    spec = preact.spec_of(tiny, schedule)

    def call(x: Tensor, *rest: Tensor) -> Tensor:
        return PreAct.apply(x, None, spec, *rest)[0]

    on_no_kink(lambda seed: gradgradcheck(call, tuple(preact.inputs(tiny, seed)), eps=1e-7, atol=1e-5, fast_mode=True))


@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize("schedule", ["block_end", "prologue"])
def test_gradgradcheck_of_dense_blocks(bottleneck, schedule):
    spec = dense.spec_of(bottleneck, schedule)

    def call(x: Tensor, *rest: Tensor) -> Tensor:
        return Dense.apply(x, None, spec, *rest)[0]

    def check(seed: int) -> bool:
        return gradgradcheck(call, tuple(dense.inputs(bottleneck, seed)), eps=1e-7, atol=1e-5, fast_mode=True)

    on_no_kink(check)


def test_gradgradcheck_of_a_chain():
    case = Case((2, 2, 3, 2), (Conv(2, 3), Conv(3)), projection=Conv(3))

    def check(seed: int) -> bool:
        tensors = tensors_of(case, seed=seed)

        def call(*leaves: Tensor) -> Tensor:
            named = dict(zip(tensors.leaves, leaves, strict=True))
            layers = [
                layer._replace(**{name: named.get(f"{name}{i}") for name in ("weight", "bias", "gamma", "beta")})
                for i, layer in enumerate(tensors.layers)
            ]
            return fused(replace(tensors, x=named["x"], layers=layers), case, ALL_SCHEDULES["moments"])

        return gradgradcheck(call, tuple(tensors.leaves.values()), eps=1e-7, atol=1e-5, fast_mode=True)

    on_no_kink(check)


def test_a_weight_that_made_the_input_too_has_the_share_of_both_uses():
    x, weight = draw(torch.empty(2, 3, 4, 5, dtype=torch.float64)), draw(torch.empty(3, 3, 1, 1, dtype=torch.float64))
    found = []
    for ours in (True, False):
        w = weight.clone().requires_grad_()
        u = x
        for _ in range(2):
            y = torch.nn.functional.conv2d(u, w)
            plain = batch_norm(y, None, None, None, None, True, eps=NORM.eps).relu()
            options = {"training": True, "eps": NORM.eps}
            u = functional.conv_bn_act(u, w, None, None, None, None, **options) if ours else plain
        (first,) = torch.autograd.grad(u.square().sum(), w, create_graph=True)
        found.append([first, *torch.autograd.grad(first.square().sum(), w)])
    assert_same(*found)


def test_running_statistics_that_moved_since_do_not_count():
    case = PROJECTED.each(frozen=True, bias=True)
    tensors = tensors_of(case)
    plain = tensors.to(torch.float64)
    z = fused(tensors, case, ALL_SCHEDULES["stats"])
    for running in tensors.running.values():
        running.add_(1)
    assert_same(twice(z, wanted(tensors), tensors.dz), twice(eager(plain, case), wanted(plain), plain.dz))


@pytest.mark.parametrize("case", FEW)
def test_first_derivatives_without_a_graph(case):
    """As where a fused backward pass is not to be had: on the node that a forward pass left behind."""
    case = CASES[case]
    tensors = tensors_of(case)
    z = fused(tensors, case, ALL_SCHEDULES["moments"])
    with torch.no_grad():
        found = composed_gradients(z.grad_fn, tensors.dz, create_graph=False)
    assert not any(grad.requires_grad for grad in found if grad is not None)
    exact = list(gradients(z, tensors).values())
    assert_same([grad for grad in found if grad is not None], exact)


@pytest.mark.parametrize("act", ["relu", None])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_functional(act, training, each_backend):
    found, ours = [], Block(SIZE, "plain")
    for block in (ours, ours.to(torch.float64)):
        main = block.norms[0]
        weight = draw(torch.empty(5, 5, 3, 3, dtype=torch.float64)).requires_grad_()
        norm = (main.gamma, main.beta, main.running_mean, main.running_var)
        if block is ours:
            y = functional.conv_bn_act(block.y, weight, *norm, training=training, padding=1)
            z = functional.bn_add_act(y, *norm, block.residual, training=training, act=act)
        else:
            y = torch.nn.functional.conv2d(block.y, weight, padding=1)
            moving = (main.running_mean, main.running_var, main.gamma, main.beta, training)
            z = batch_norm(batch_norm(y, *moving).relu(), *moving) + block.residual
            z = z.relu() if act else z
        found.append(twice(z, [block.y, weight, main.gamma, main.beta, block.residual], block.dz))
    assert_same(*found)


@pytest.mark.parametrize("spec", [NORM, FROZEN], ids=["batch", "running"])
def test_batches_of_gradients_at_block_ends(spec, each_backend):
    ours = Block(SIZE, "normalised")
    plain = ours.to(torch.float64)
    dz = torch.randn(3, *SIZE, dtype=torch.float64)
    found = []
    for block, run in ((ours, ours.fused), (plain, plain.eager)):
        leaves = list(block.leaves.values())
        found.append(torch.autograd.grad(run(spec, spec), leaves, dz, is_grads_batched=True))
    assert_same(*map(list, found))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_no_second_copy_of_the_input_is_kept(layout):
    tensors = tensors_of(CASES["bottleneck"])
    x = tensors.x.detach().contiguous(memory_format=layout).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused(replace(tensors, x=x), CASES["bottleneck"], ALL_SCHEDULES["moments"])
    of_its_size = [t for t in kept if t.shape == x.shape and t.is_floating_point()]
    bytes_kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in of_its_size}
    anchor = 0 if layout is torch.channels_last else x.element_size()
    assert sum(bytes_kept.values()) == x.numel() * x.element_size() + anchor


@pytest.mark.parametrize("schedule", ["block_end", "moments"])
@pytest.mark.parametrize("case", ["basic block", "bottleneck, projection"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(case, dtype, schedule):
    """ReLUs are kept open: one that flips within rounding is an error of its own, in eager PyTorch too."""
    case = CASES[case].each(open=True)
    exact = tensors_of(case)
    low, theirs = exact.to(dtype, torch.float32), exact.to(dtype)
    third = exact.to(torch.float64)
    z = fused(low, case, ALL_SCHEDULES[schedule])
    assert z.dtype == dtype
    runs = [twice(z, wanted(low), low.dz)]
    runs.append(twice(eager(theirs, case), wanted(theirs), theirs.dz))
    runs.append(twice(eager(third, case), wanted(third), third.dz))
    ours, plain, truth = (torch.cat([grad.detach().double().flatten() for grad in run]) for run in runs)
    assert_as_accurate_as_eager(ours, plain, truth, floor=torch.finfo(dtype).eps)


def test_backends_of_the_forward_pass_decide_nothing():
    tensors = tensors_of(PROJECTED)
    found = []
    for name in ("native", "reference"):
        with backend(name):
            z = fused(tensors, PROJECTED, ALL_SCHEDULES["prologue"])
        found.append(twice(z, wanted(tensors), tensors.dz))
    assert_same(*found, tolerance=1e-12)
