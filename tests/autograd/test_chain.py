"""fusedres.autograd.chain: the whole algebra in fp64 against autograd of plain PyTorch, on every schedule."""

from dataclasses import replace

import pytest
import torch

from fusedres.activation import IDENTITY
from fusedres.autograd import ConvChain
from fusedres.operands import Geometry
from fusedres.ops.act_mask import is_bits
from fusedres.ops.conv_input_grad import conv_input_grad
from fusedres.ops.conv_weight_grad import conv_weight_grad
from fusedres.ops.moments_backward import moments_contraction, moments_input_grad
from fusedres.runtime import replay
from fusedres.runtime.backends import backend
from tests.autograd.chains import (
    ALL_SCHEDULES,
    BASIC,
    BLOCK,
    BOTTLENECK,
    CASES,
    PROJECTED,
    STRIDED,
    Case,
    Conv,
    before_act,
    eager,
    fused,
    gradients,
    kink_margin,
    moments_forms,
    spec_of,
    tensors_of,
)
from tests.comparison import LOW, assert_as_accurate_as_eager, assert_close, relative_error

TIGHT = 1e-10
every_schedule = pytest.mark.parametrize("schedule", ALL_SCHEDULES)


def largest_of(gradients):
    return max(float(gradient.norm()) for gradient in gradients.values())


def assert_same(actual, exact, tolerance=TIGHT, largest=None):
    """Gradients by name; one that vanishes exactly (a bias, a constant input) is measured against the largest."""
    assert actual.keys() == exact.keys()
    largest = largest or largest_of(exact)
    for name, gradient in exact.items():
        scale = largest if float(gradient.norm()) < 1e-9 * largest else None
        assert_close(actual[name], gradient, tolerance, scale=scale, name=name)


def all_forms():
    """Every case on every schedule, in every form that its last convolution and projection can take."""
    for name, case in CASES.items():
        for schedule in ALL_SCHEDULES:
            for moments in moments_forms(case):
                form = {(False, False): "", (True, False): "-main", (False, True): "-projection"}.get(moments, "-both")
                yield pytest.param(case, schedule, moments, id=f"{name}-{schedule}{form}")


@pytest.mark.parametrize(("case", "schedule", "moments"), list(all_forms()))
def test_is_autograd_of_plain_pytorch(case, schedule, moments, each_backend):
    ours = tensors_of(case)
    plain = ours.to(torch.float64)
    z, exact = fused(ours, case, ALL_SCHEDULES[schedule], moments), eager(plain, case)
    assert_close(z, exact, TIGHT, name="z")
    assert_same(gradients(z, ours), gradients(exact, plain))
    for name, running in plain.running.items():
        assert_close(ours.running[name], running, TIGHT, name=name)


@every_schedule
def test_frozen_statistics_are_not_moved(schedule, each_backend):
    case = CASES["bottleneck, frozen statistics"]
    ours = tensors_of(case)
    before = {name: tensor.clone() for name, tensor in ours.running.items()}
    fused(ours, case, ALL_SCHEDULES[schedule]).sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.running.items())


TINY = {
    "basic block": Case((2, 2, 3, 2), (Conv(2, 3), Conv(2, 3)), "identity"),
    "bottleneck, strided projection": Case(
        (2, 2, 3, 3), (Conv(2), Conv(2, 3, stride=2), Conv(4)), projection=Conv(4, stride=2)
    ),
    "bottleneck": Case((2, 4, 2, 2), (Conv(2), Conv(2, 3), Conv(4)), "identity"),
    "1x1, external residual": Case((2, 2, 2, 2), (Conv(4),), "residual"),
    "1x1, frozen, biased, no ReLU": Case((1, 2, 2, 2), (Conv(4, frozen=True, bias=True),), act=IDENTITY),
    "zero-pad": Case((1, 2, 3, 3), (Conv(3, 3, stride=2),), "zero_pad", stride=2),
}


@every_schedule
@pytest.mark.parametrize("case", TINY)
def test_gradcheck(case, schedule):
    case = TINY[case]
    if not any(conv.frozen for conv in case.every):
        case = case.each(running=False)
    # The finite differences must stay on one side of every ReLU's kink.
    tensors = next(t for t in (tensors_of(case, seed=seed) for seed in range(500)) if kink_margin(t, case) > 1e-2)
    flat = [tensor for layer in tensors.layers for tensor in layer]
    with backend("reference"):
        spec = spec_of(case, ALL_SCHEDULES[schedule], torch.float64)
        assert torch.autograd.gradcheck(
            lambda x, residual, *rest: ConvChain.apply(x, residual, spec, *rest),
            (tensors.x, tensors.residual, *flat),
            nondet_tol=0.0,
        )


BIASED = STRIDED.each(bias=True)
WITH_RESIDUAL = Case((2, 5, 5, 4), BOTTLENECK, "residual").each(bias=True)


def subsets(names):
    """Each leaf alone, each alone missing, and some at random."""
    yield from ({name} for name in names)
    yield from (set(names) - {name} for name in names)
    rng = torch.Generator().manual_seed(0)
    for _ in range(12):
        yield {name for name in names if torch.rand((), generator=rng) < 0.4} or {"x"}


@every_schedule
@pytest.mark.parametrize("case", ["strided bottleneck", "external residual"])
def test_any_subset_of_gradients(case, schedule, each_backend):
    case = {"strided bottleneck": BIASED, "external residual": WITH_RESIDUAL}[case]
    plain = tensors_of(case)
    exact = gradients(eager(plain, case), plain)
    for wanted in subsets(list(exact)):
        ours = tensors_of(case)
        for name, leaf in ours.leaves.items():
            leaf.requires_grad_(name in wanted)
        z = fused(ours, case, ALL_SCHEDULES[schedule])
        z.backward(ours.dz)
        assert_same(
            {name: leaf.grad for name, leaf in ours.leaves.items() if leaf.grad is not None},
            {name: exact[name] for name in exact if name in wanted},
            largest=largest_of(exact),
        )


@pytest.fixture
def calls(monkeypatch):
    """How often each contraction of the backward pass ran, whoever called it."""
    counts = dict.fromkeys(("weight", "input", "moments", "moments input"), 0)
    ops = (conv_weight_grad, conv_input_grad, moments_contraction, moments_input_grad)
    for kind, op in zip(counts, ops, strict=True):

        def counted(*args, plain=op.reference, kind=kind, **kwargs):
            counts[kind] += 1
            return plain(*args, **kwargs)

        monkeypatch.setattr(op, "reference", counted)
    with backend("reference"), replay.off():
        yield counts


FROZEN = {
    "everything but the last gamma": ({"gamma2"}, 0, 0),
    "everything but the last weight": ({"weight2"}, 1, 0),
    "everything but the projection": ({"weight3", "gamma3", "beta3"}, 1, 0),
    "x and the first layer": ({"weight1", "weight2", "gamma1", "weight3"}, 3, 1),
    "x": ({f"{name}{i}" for name in ("weight", "gamma", "beta") for i in range(4)}, 4, 2),
    "all weights": ({"x", *(f"{name}{i}" for name in ("gamma", "beta") for i in range(4))}, 0, 4),
    "all parameters": ({"x"}, 0, 4),
    "the projection and the second weight": ({"weight0", "weight2", "gamma1"}, 2, 2),
}


@pytest.mark.parametrize("schedule", ["block_end", "stats", "prologue", "library"])
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_leaves_cost_no_contraction(frozen, schedule, calls):
    wanted, weights, inputs = FROZEN[frozen]
    tensors = tensors_of(STRIDED)
    for name, leaf in tensors.leaves.items():
        leaf.requires_grad_(name in wanted)
    z = fused(tensors, STRIDED, ALL_SCHEDULES[schedule])
    calls.update(dict.fromkeys(calls, 0))
    z.backward(tensors.dz)
    assert (calls["weight"], calls["input"]) == (weights, inputs)
    assert calls["moments"] == calls["moments input"] == 0


@pytest.mark.parametrize(
    ("wanted", "contractions", "inputs", "reason"),
    [
        ({"weight2"}, 1, 0, "the last layer alone"),
        ({"weight3"}, 1, 0, "the projection alone"),
        ({"weight1"}, 1, 1, "batch norm's part of du needs D of the last layer, the projection needs nothing"),
        ({"x"}, 2, 2, "both branches pass a gradient on"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_frozen_leaves_cost_no_contraction_in_the_moments_form(wanted, contractions, inputs, reason, calls):
    tensors = tensors_of(STRIDED)
    for name, leaf in tensors.leaves.items():
        leaf.requires_grad_(name in wanted)
    z = fused(tensors, STRIDED, ALL_SCHEDULES["moments"])
    calls.update(dict.fromkeys(calls, 0))
    z.backward(tensors.dz)
    assert (calls["moments"], calls["moments input"]) == (contractions, inputs), reason


@every_schedule
def test_nothing_is_kept_where_nothing_asks_for_a_gradient(schedule, each_backend):
    tensors = tensors_of(PROJECTED)
    for leaf in tensors.leaves.values():
        leaf.requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        z = fused(tensors, PROJECTED, ALL_SCHEDULES[schedule])
    assert not z.requires_grad
    assert saved == []
    plain = tensors_of(PROJECTED)
    assert_close(z, eager(plain, PROJECTED), TIGHT)
    for name, running in plain.running.items():
        assert_close(tensors.running[name], running, TIGHT, name=name)


@every_schedule
def test_first_derivatives_under_create_graph_are_usable(schedule, each_backend):
    tensors = tensors_of(PROJECTED)
    plain = tensors.to(torch.float64)
    ours = gradients(fused(tensors, PROJECTED, ALL_SCHEDULES[schedule]), tensors, create_graph=True)
    assert_same(ours, gradients(eager(plain, PROJECTED), plain))
    head = torch.randn((), dtype=torch.float64, requires_grad=True)
    (ours["x"].detach() * head).sum().backward()
    assert_close(head.grad, ours["x"].detach().sum())


@every_schedule
@pytest.mark.parametrize("case", ["bottleneck", "bottleneck, projection", "basic block"])
def test_backward_twice_over_one_graph(case, schedule, each_backend):
    case = CASES[case]
    tensors = tensors_of(case)
    z = fused(tensors, case, ALL_SCHEDULES[schedule])
    once = gradients(z, tensors, retain_graph=True)
    again = gradients(z, tensors)
    assert all(torch.equal(once[name], again[name]) for name in once)
    with pytest.raises(RuntimeError, match="second time"):
        gradients(z, tensors)


@every_schedule
@pytest.mark.parametrize("case", ["bottleneck, projection", "basic block", "bottleneck, frozen statistics"])
def test_two_forward_passes_before_one_backward_pass(case, schedule, each_backend):
    """Siamese networks, shared weights: the second pass moves the running statistics again."""
    case = CASES[case]
    ours = tensors_of(case)
    plain = ours.to(torch.float64)
    both = []
    for tensors, run in ((ours, lambda t: fused(t, case, ALL_SCHEDULES[schedule])), (plain, lambda t: eager(t, case))):
        first = run(tensors)
        second = run(replace(tensors, x=tensors.x.flip(2) * 0.7))
        both.append(gradients(first + second, tensors))
    assert_same(*both)
    for name, running in plain.running.items():
        assert_close(ours.running[name], running, TIGHT, name=name)


@every_schedule
@pytest.mark.parametrize("case", [BLOCK, STRIDED, CASES["basic block, zero-pad, odd difference"]])
@pytest.mark.parametrize("layout", ["contiguous", "strided view", "channels_last"])
def test_layouts_of_input_and_gradient(layout, case, schedule, each_backend):
    def laid_out(tensor):
        if layout == "strided view":
            wide = torch.zeros(*tensor.shape[:3], 2 * tensor.shape[3], dtype=tensor.dtype)
            wide[..., ::2] = tensor
            return wide[..., ::2]
        formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
        return tensor.contiguous(memory_format=formats[layout])

    ours, plain = tensors_of(case), tensors_of(case)
    exact = gradients(eager(plain, case), plain)
    z = fused(replace(ours, x=laid_out(ours.x)), case, ALL_SCHEDULES[schedule])
    assert z.is_contiguous(memory_format=torch.channels_last)
    ours.dz = laid_out(ours.dz)
    assert_same(gradients(z, ours), exact)


@every_schedule
@pytest.mark.parametrize("case", [BLOCK, STRIDED, WITH_RESIDUAL, replace(BLOCK, act=IDENTITY)])
def test_expanded_gradient(case, schedule, each_backend):
    """The gradient of a mean has stride zero everywhere, and must not be written to."""
    ours, plain = tensors_of(case), tensors_of(case)
    for tensors, z in ((ours, fused(ours, case, ALL_SCHEDULES[schedule])), (plain, eager(plain, case))):
        (z.mean() * 100).backward()
        assert all(leaf.grad is not None for leaf in tensors.leaves.values())
    assert_same(*({name: leaf.grad for name, leaf in t.leaves.items()} for t in (ours, plain)))


@every_schedule
@pytest.mark.parametrize("case", [BLOCK, PROJECTED, WITH_RESIDUAL])
def test_nothing_given_is_written_to(case, schedule, each_backend):
    tensors = tensors_of(case)
    before = {name: leaf.detach().clone() for name, leaf in tensors.leaves.items()}
    dz = tensors.dz.contiguous(memory_format=torch.channels_last)
    copy = dz.clone()
    z = fused(tensors, case, ALL_SCHEDULES[schedule])
    value = z.detach().clone()
    z.backward(dz)
    assert torch.equal(dz, copy)
    assert torch.equal(z, value)
    assert all(torch.equal(leaf, before[name]) for name, leaf in tensors.leaves.items())


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_input_gives_the_same_bits(dtype, schedule, each_backend):
    case = Case((4, 32, 9, 7), (Conv(8), Conv(8, 3), Conv(32)), "identity")
    runs = []
    for _ in range(2):
        tensors = tensors_of(case, dtype)
        z = fused(tensors, case, ALL_SCHEDULES[schedule])
        runs.append({"z": z, **gradients(z, tensors), **tensors.running})
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


# Saved tensors


def saved_by(run):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        z = run()
    return z, saved


@pytest.mark.parametrize("case", [PROJECTED, STRIDED, WITH_RESIDUAL, replace(PROJECTED, projection=None)])
def test_last_output_is_never_saved_in_the_moments_form(case, each_backend):
    tensors = tensors_of(case)
    z, saved = saved_by(lambda: fused(tensors, case, ALL_SCHEDULES["moments"]))
    assert not [t for t in saved if t.shape == z.shape and t.dtype.is_floating_point]
    n, k, p, q = z.shape
    masks = [t for t in saved if is_bits(t)]
    assert [tuple(mask.shape) for mask in masks] == [(n, p, q, -(-k // 8))]


def test_with_an_identity_only_the_input_has_the_shape_of_the_output(each_backend):
    tensors = tensors_of(BLOCK)
    x = replace(tensors, x=tensors.x.contiguous(memory_format=torch.channels_last))
    z, saved = saved_by(lambda: fused(x, BLOCK, ALL_SCHEDULES["moments"]))
    wide = [t for t in saved if t.shape == z.shape and t.dtype.is_floating_point]
    assert {t.data_ptr() for t in wide} == {x.x.data_ptr()}


@pytest.mark.parametrize("schedule", ["prologue", "moments"])
@pytest.mark.parametrize("case", [BLOCK, STRIDED, Case((2, 6, 7, 5), BASIC, "identity")])
def test_inner_relu_outputs_are_never_saved(case, schedule, each_backend):
    tensors = tensors_of(case)
    inner = []
    with torch.no_grad():
        eager(tensors.to(torch.float64), case, inner)
    _, saved = saved_by(lambda: fused(tensors, case, ALL_SCHEDULES[schedule]))
    assert len(inner) == len(case.layers) - 1
    for u in inner:
        assert not [t for t in saved if t.shape == u.shape and torch.allclose(t.double(), u)]


@pytest.mark.parametrize("schedule", ["block_end", "stats", "prologue", "moments"])
def test_the_output_is_not_saved_beside_its_bit_mask(schedule, each_backend):
    tensors = tensors_of(STRIDED)
    z, saved = saved_by(lambda: fused(tensors, STRIDED, ALL_SCHEDULES[schedule]))
    assert not [t for t in saved if t.dtype.is_floating_point and t.shape == z.shape and torch.equal(t, z)]
    z.detach().add_(1.0)  # what a network does in place afterwards must not matter
    plain = tensors_of(STRIDED)
    assert_same(gradients(z, tensors), gradients(eager(plain, STRIDED), plain))


# Low precision

WIDE = {
    "bottleneck": Case((4, 64, 10, 9), (Conv(16), Conv(16, 3), Conv(64)), "identity"),
    "bottleneck, strided projection": Case(
        (4, 32, 11, 12), (Conv(16), Conv(16, 3, stride=2), Conv(64)), projection=Conv(64, stride=2)
    ),
    "basic block": Case((4, 32, 10, 9), (Conv(32, 3), Conv(32, 3)), "identity"),
    "basic block, zero-pad": Case((4, 16, 10, 9), (Conv(32, 3, stride=2), Conv(32, 3)), "zero_pad", stride=2),
    "one 1x1, external residual, no ReLU": Case((4, 16, 10, 9), (Conv(64),), "residual", act=IDENTITY),
    "bottleneck, frozen statistics": Case((4, 32, 10, 9), (Conv(16), Conv(16, 3), Conv(64)), projection=Conv(64)).each(
        frozen=True
    ),
}


def run_low(case, schedule, dtype, *, pure, offset=0.0, away_from_kinks=True, seed=0):
    """(ours, eager's, exact) as dicts of the output, the gradients and the running statistics."""
    ours = tensors_of(case, torch.float32, seed=seed)
    ours.dz = ours.dz + offset
    if pure:
        ours = ours.to(dtype)
    exact, plain = ours.to(torch.float64), ours.to(ours.x.dtype)
    if away_from_kinks and not case.act.is_identity:
        with torch.no_grad():
            clear = before_act(ours.to(torch.float64), case).abs() > 0.25
        for tensors in (ours, plain, exact):
            tensors.dz = tensors.dz * clear
    true = eager(exact, case)
    with torch.autocast("cpu", dtype, enabled=not pure):
        z, theirs = fused(ours, case, ALL_SCHEDULES[schedule], dtype=dtype), eager(plain, case)
    triples = ((z, ours), (theirs, plain), (true, exact))
    return [{"z": z, **gradients(z, tensors), **tensors.running} for z, tensors in triples]


def assert_pooled_as_accurate(case, schedule, dtype, *, seeds, floor, **keywords):
    """Root mean squares over seeds: in a vector of sixteen numbers, or with few ReLUs that flip, one run is luck."""
    pooled = {}
    for seed in range(seeds):
        ours, eagers, exact = run_low(case, schedule, dtype, seed=seed, **keywords)
        largest = max(float(tensor.norm()) for tensor in exact.values())
        for name, true in exact.items():
            assert ours[name].dtype == eagers[name].dtype, name
            # A shift between two linear layers that batch norm takes out again has no gradient at all.
            scale = largest if float(true.norm()) < 1e-9 * largest else None
            squares = [relative_error(result[name], true, scale) ** 2 for result in (ours, eagers)]
            pooled.setdefault(name, []).append(squares)
    for name, squares in pooled.items():
        mine, theirs = torch.tensor(squares, dtype=torch.float64).mean(0).sqrt().tolist()
        assert mine <= max(1.5 * theirs, floor), f"{name}: relative error {mine:.2e}, eager's is {theirs:.2e}"


OPEN = {name: case.each(open=True) for name, case in WIDE.items()}


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("offset", [0.0, 2.0])
@every_schedule
@pytest.mark.parametrize("case", OPEN)
def test_autocast_is_as_accurate_as_eager(case, schedule, offset, dtype, each_backend):
    """Away from the kinks of the ReLUs. Where the gradient has a mean, as that of an average does, sums are large
    against what is left of them when they are centred."""
    floor = torch.finfo(dtype).eps / 2
    assert_pooled_as_accurate(OPEN[case], schedule, dtype, seeds=4, floor=floor, pure=False, offset=offset)


@pytest.mark.parametrize("dtype", LOW)
@every_schedule
@pytest.mark.parametrize("case", OPEN)
def test_modules_of_sixteen_bits(case, schedule, dtype, each_backend):
    assert_pooled_as_accurate(OPEN[case], schedule, dtype, seeds=2, floor=torch.finfo(dtype).eps / 2, pure=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("pure", [False, True], ids=["autocast", "pure"])
@every_schedule
@pytest.mark.parametrize("case", ["bottleneck", "bottleneck, strided projection", "basic block"])
def test_relus_flip_no_more_than_eagers(case, schedule, pure, dtype):
    """Of n ReLUs, about n times the relative rounding of y flip, each at the cost of its whole gradient."""
    floor = (torch.finfo(dtype).eps / 8) ** 0.5
    assert_pooled_as_accurate(WIDE[case], schedule, dtype, seeds=8, floor=floor, pure=pure, away_from_kinks=False)


@every_schedule
@pytest.mark.parametrize("case", WIDE)
def test_fp32_is_as_accurate_as_eager(case, schedule, each_backend):
    case = WIDE[case]
    ours = tensors_of(case, torch.float32)
    plain, exact = ours.to(torch.float32), ours.to(torch.float64)
    z, theirs, true = fused(ours, case, ALL_SCHEDULES[schedule]), eager(plain, case), eager(exact, case)
    assert_as_accurate_as_eager(z, theirs, true, floor=1e-6, name="z")
    gradient, expected = gradients(z, ours), gradients(theirs, plain)
    for name, exactly in gradients(true, exact).items():
        assert_as_accurate_as_eager(gradient[name], expected[name], exactly, floor=2e-6, name=f"gradient of {name}")
    for name, running in exact.running.items():
        assert_as_accurate_as_eager(ours.running[name], plain.running[name], running, floor=1e-6, name=name)


@every_schedule
def test_large_mean_in_fp32(schedule, each_backend):
    """|mean| / std = 500 in the input: every rung keeps the statistics and the gradients."""
    case = Case((4, 16, 20, 20), (Conv(64),), projection=Conv(64))
    ours = tensors_of(case, torch.float32)
    with torch.no_grad():
        ours.x += 500
    plain, exact = ours.to(torch.float32), ours.to(torch.float64)
    # The library rounds more where channels are innermost, as they are for us.
    plain.x = plain.x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    z, theirs, true = fused(ours, case, ALL_SCHEDULES[schedule]), eager(plain, case), eager(exact, case)
    # y is some 2000 with a rounding of 1e-4 and a deviation of some units; the moments form does not round it.
    assert_as_accurate_as_eager(z, theirs, true, floor=1e-4 if schedule == "moments" else 5e-4, name="z")
    gradient, expected = gradients(z, ours), gradients(theirs, plain)
    for name, exactly in gradients(true, exact).items():
        # One in a thousand of the ReLUs flips within that.
        assert_as_accurate_as_eager(gradient[name], expected[name], exactly, floor=3e-2, name=f"gradient of {name}")
    for name, running in exact.running.items():
        assert_as_accurate_as_eager(ours.running[name], plain.running[name], running, floor=1e-4, name=name)


def test_specs_of_these_tests_say_what_they_mean():
    spec = spec_of(STRIDED, ALL_SCHEDULES["moments"], torch.float64)
    assert [layer.moments for layer in spec.layers] == [False, False, True]
    assert spec.projection.moments
    assert spec.layers[1].geometry == Geometry((2, 2), (1, 1))
