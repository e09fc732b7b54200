"""fusedres.autograd.stem: conv, batch norm, ReLU and max-pool as one node, with and without its raw output."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import max_pool2d

from fusedres.activation import IDENTITY
from fusedres.autograd import StemPool
from fusedres.autograd.spec import LayerSpec, StemSpec
from fusedres.operands import NormNumbers, PoolGeometry
from fusedres.runtime.backends import backend
from fusedres.runtime.call import Call
from tests.autograd.chains import ALL_SCHEDULES, EPS, MOMENTUM, Case, Conv, eager, gradients, tensors_of
from tests.comparison import LOW, assert_as_accurate_as_eager, assert_close

STEM = Conv(6, 7, stride=2)
POOL = PoolGeometry()
every_schedule = pytest.mark.parametrize("schedule", ALL_SCHEDULES)

# case, pool
CASES = {
    "ResNet's": (Case((2, 3, 20, 18), (STEM,)), POOL),
    "odd size": (Case((2, 3, 23, 17), (STEM,)), POOL),
    "one image": (Case((1, 3, 21, 16), (STEM,)), POOL),
    "3x3 without overlap": (Case((2, 3, 9, 8), (Conv(5, 3),)), PoolGeometry((2, 2), (2, 2), (0, 0))),
    "1x1": (Case((2, 3, 8, 8), (Conv(9),)), POOL),
    "nothing square": (Case((2, 4, 11, 9), (Conv(5, 3, stride=2),)), PoolGeometry((3, 2), (1, 2), (1, 0))),
    "grouped": (Case((2, 4, 9, 9), (Conv(6, 3, groups=2),)), POOL),
    "dilated": (Case((2, 3, 12, 11), (Conv(5, 3, dilation=2),)), POOL),
    "biased": (Case((2, 3, 12, 11), (replace(STEM, bias=True),)), POOL),
    "frozen": (Case((2, 3, 12, 11), (replace(STEM, frozen=True),)), POOL),
    "frozen, biased": (Case((2, 3, 12, 11), (replace(STEM, frozen=True, bias=True),)), POOL),
    "not affine": (Case((2, 3, 12, 11), (replace(STEM, affine=False),)), POOL),
    "not affine, frozen": (Case((2, 3, 12, 11), (replace(STEM, affine=False, frozen=True),)), POOL),
    "no running statistics": (Case((2, 3, 12, 11), (replace(STEM, running=False),)), POOL),
    "gamma = 0": (Case((2, 3, 12, 11), (replace(STEM, gamma="zero"),)), POOL),
    "gamma < 0": (Case((2, 3, 12, 11), (replace(STEM, gamma="negative"),)), POOL),
    "gamma and beta = 0": (Case((2, 3, 12, 11), (replace(STEM, gamma="zero, and beta"),)), POOL),
    "gamma = 0 in one channel": (Case((2, 3, 12, 11), (replace(STEM, gamma="one channel zero"),)), POOL),
}


def stem_tensors(case, pool, dtype=torch.float64, *, image=True, seed=0):
    tensors = tensors_of(case, dtype, seed)
    size = pool.output_size(*tensors.dz.shape[2:])
    tensors.dz = tensors.dz[:, :, : size[0], : size[1]].contiguous()
    tensors.x.requires_grad_(image)
    return tensors


def fused(tensors, case, pool, schedule, dtype=None):
    (conv,) = case.layers
    layer = LayerSpec(conv.geometry, NormNumbers(EPS, MOMENTUM, not conv.frozen))
    call = replace(Call.on(tensors.x, tensors.layers[0]), dtype=dtype or tensors.x.dtype)
    spec = StemSpec(call, ALL_SCHEDULES[schedule], layer, pool, tensors.x.requires_grad)
    return StemPool.apply(tensors.x, None, spec, *tensors.layers[0])


def plainly(tensors, case, pool):
    return max_pool2d(eager(tensors, case), *pool)


def assert_same(ours, exact, tolerance=1e-10):
    largest = max(float(gradient.norm()) for gradient in exact.values())
    assert ours.keys() == exact.keys()
    for name, gradient in exact.items():
        scale = largest if float(gradient.norm()) < 1e-9 * largest else None
        assert_close(ours[name], gradient, tolerance, scale=scale, name=name)


@pytest.mark.parametrize("image", [False, True], ids=["parameters", "and the image"])
@every_schedule
@pytest.mark.parametrize("case", CASES)
def test_is_autograd_of_plain_pytorch(case, schedule, image, each_backend):
    case, pool = CASES[case]
    ours = stem_tensors(case, pool, image=image)
    plain = ours.to(torch.float64)
    z, exact = fused(ours, case, pool, schedule), plainly(plain, case, pool)
    assert_close(z, exact, 1e-10)
    assert_same(gradients(z, ours), gradients(exact, plain))
    for name, running in plain.running.items():
        assert_close(ours.running[name], running, 1e-10, name=name)


@every_schedule
@pytest.mark.parametrize("image", [False, True], ids=["parameters", "and the image"])
def test_gradcheck(image, schedule):
    case = Case((2, 2, 4, 4), (Conv(2, 3, running=False),))
    pool = PoolGeometry((2, 2), (2, 2), (0, 0))

    def margin(tensors):
        """Distance from the ReLU's kink, and between the two largest of a window."""
        with torch.no_grad():
            y = eager(tensors, replace(case, act=IDENTITY))
        windows = y.unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2).sort(-1).values
        return min(float(y.abs().min()), float((windows[..., -1] - windows[..., -2]).min()))

    seed = max(range(300), key=lambda seed: margin(tensors_of(case, seed=seed)))
    tensors = stem_tensors(case, pool, image=image, seed=seed)
    assert margin(tensors) > 5e-3
    (conv,) = case.layers
    with backend("reference"):
        layer, call = LayerSpec(conv.geometry, NormNumbers(EPS, MOMENTUM)), Call.on(tensors.x, tensors.layers[0])
        spec = StemSpec(call, ALL_SCHEDULES[schedule], layer, pool, image)
        assert torch.autograd.gradcheck(
            lambda x, *rest: StemPool.apply(x, None, spec, *rest), (tensors.x, *tensors.layers[0]), nondet_tol=0.0
        )


@pytest.mark.parametrize("statistics", ["batch", "frozen"])
def test_raw_output_is_not_saved_in_the_moments_form(statistics, each_backend):
    case = Case((2, 3, 24, 20), (replace(STEM, frozen=statistics == "frozen"),))
    for image in (False, True):
        tensors = stem_tensors(case, POOL, image=image)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            z = fused(tensors, case, POOL, "moments")
        wide = [t for t in saved if t.shape == (2, 6, 12, 10)]
        # The gradient of an image (adversarial examples) needs y.
        assert len(wide) == int(image)
        assert [t.shape for t in saved if t.dtype == torch.uint8] == [z.shape]


@every_schedule
def test_any_one_leaf_alone_or_missing(schedule, each_backend):
    case, pool = CASES["biased"]
    plain = stem_tensors(case, pool)
    exact = gradients(plainly(plain, case, pool), plain)
    largest = max(float(gradient.norm()) for gradient in exact.values())
    for chosen in exact:
        for alone in (True, False):
            ours = plain.to(torch.float64)
            for name, leaf in ours.leaves.items():
                leaf.requires_grad_((name == chosen) is alone)
            fused(ours, case, pool, schedule).backward(ours.dz)
            for name, leaf in ours.leaves.items():
                if not leaf.requires_grad:
                    assert leaf.grad is None
                elif name == "bias0":
                    assert_close(leaf.grad, exact[name], 1e-10, scale=largest, name=name)
                else:
                    assert_close(leaf.grad, exact[name], 1e-10, name=name)


@every_schedule
@pytest.mark.parametrize("image", [False, True], ids=["parameters", "and the image"])
def test_expanded_gradient_and_backward_twice(image, schedule, each_backend):
    case, pool = CASES["odd size"]
    ours = stem_tensors(case, pool, image=image)
    plain = ours.to(torch.float64)
    (plainly(plain, case, pool).mean() * 100).backward()
    z = fused(ours, case, pool, schedule)
    loss = z.mean() * 100
    leaves = {name: leaf for name, leaf in ours.leaves.items() if leaf.requires_grad}
    once = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    again = torch.autograd.grad(loss, list(leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    for (name, _), gradient in zip(leaves.items(), once, strict=True):
        assert_close(gradient, plain.leaves[name].grad, 1e-10, name=name)


@every_schedule
def test_two_forward_passes_before_one_backward_pass(schedule, each_backend):
    case, pool = CASES["odd size"]
    ours = stem_tensors(case, pool)
    plain = ours.to(torch.float64)
    found = []
    for tensors, run in (
        (ours, lambda t: fused(t, case, pool, schedule)),
        (plain, lambda t: plainly(t, case, pool)),
    ):
        z = run(tensors) + run(replace(tensors, x=tensors.x.flip(3) * 0.7))
        found.append(gradients(z, tensors))
    assert_same(*found)


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_input_gives_the_same_bits(dtype, schedule, each_backend):
    runs = []
    for _ in range(2):
        case, pool = CASES["odd size"]
        tensors = stem_tensors(case, pool, dtype, image=False)
        z = fused(tensors, case, pool, schedule)
        runs.append({"z": z, **gradients(z, tensors), **tensors.running})
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("precision", ["fp32", "autocast bf16", "autocast fp16", "bf16", "fp16"])
@pytest.mark.parametrize("mean", [0.0, 2.0], ids=["normalised image", "raw image"])
@every_schedule
def test_is_as_accurate_as_eager(schedule, mean, precision, each_backend):
    """Without overlap and without ReLU's kink (all channels shifted up), so that rounding moves few maxima; a raw
    image has a mean of two deviations."""
    case, pool = Case((4, 3, 26, 26), (replace(STEM, k=16, open=True),)), PoolGeometry((1, 1), (1, 1), (0, 0))
    dtype = {"bf16": LOW[0], "fp16": LOW[1]}.get(precision.split()[-1], torch.float32)
    ours = stem_tensors(case, pool, torch.float32, image=False)
    ours.x += mean
    if not precision.startswith("autocast"):
        ours = ours.to(dtype)
    plain, exact = ours.to(ours.x.dtype), ours.to(torch.float64)
    results = []
    for tensors, run in (
        (ours, lambda t: fused(t, case, pool, schedule, dtype)),
        (plain, lambda t: plainly(t, case, pool)),
        (exact, lambda t: plainly(t, case, pool)),
    ):
        with torch.autocast("cpu", dtype, enabled=precision.startswith("autocast") and tensors is not exact):
            z = run(tensors)
        results.append({"z": z, **gradients(z, tensors), **tensors.running})
    floor = 4e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    for name in results[2]:
        assert_as_accurate_as_eager(*(result[name] for result in results), floor=floor, name=name)
