"""Every pattern with every activation in the place of the ReLU, in fp64 against autograd of plain PyTorch."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import batch_norm, conv2d, max_pool2d

from fusedres.activation import GELU, GELU_TANH, HARDSWISH, IDENTITY, MISH, RELU, RELU6, SILU, elu, leaky_relu
from fusedres.autograd.shortcut import Identity, Projection, Residual
from fusedres.functional import add_act, bn_add_act
from fusedres.operands import Geometry, Layer, Norm, NormNumbers, PoolGeometry
from fusedres.patterns.bn_act import run_bn_act
from fusedres.patterns.chain import run_chain
from fusedres.patterns.dense import DenseLayerParts, run_dense
from fusedres.patterns.preact import run_preact
from fusedres.patterns.stem import run_stem
from fusedres.plan.schedule import SCHEDULES
from tests.autograd.chains import ALL_SCHEDULES, CASES, eager, fused, gradients, moments_forms, tensors_of
from tests.autograd.test_composed import assert_same, twice, wanted

ACTS = {
    str(act): act
    for act in (leaky_relu(0.2), leaky_relu(-0.3), RELU6, SILU, HARDSWISH, GELU, GELU_TANH, MISH, elu(0.5))
}
every_act = pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
every_rung = pytest.mark.parametrize("schedule", SCHEDULES)
# One of each shortcut, with and without batch statistics.
FEW = (
    "basic block",
    "basic block, strided projection, odd size",
    "basic block, zero-pad, odd difference",
    "bottleneck, projection",
    "bottleneck, external residual",
    "bottleneck, frozen statistics, biased",
    "one 3x3",
)


@every_act
@pytest.mark.parametrize("schedule", ALL_SCHEDULES)
@pytest.mark.parametrize("case", FEW)
def test_chains(case, schedule, act, each_backend):
    case = replace(CASES[case], act=act, inner=act)
    for moments in moments_forms(case):
        ours = tensors_of(case)
        plain = ours.to(torch.float64)
        z, exact = fused(ours, case, ALL_SCHEDULES[schedule], moments), eager(plain, case)
        assert_same([z, *gradients(z, ours).values()], [exact, *gradients(exact, plain).values()], 1e-10)


@pytest.mark.parametrize(("inner", "end"), [(SILU, RELU), (RELU, SILU), (RELU6, IDENTITY), (IDENTITY, leaky_relu())])
@pytest.mark.parametrize("schedule", ALL_SCHEDULES)
def test_another_activation_inside_than_at_the_end(schedule, inner, end):
    case = replace(CASES["bottleneck, projection"], act=end, inner=inner)
    ours = tensors_of(case)
    plain = ours.to(torch.float64)
    z, exact = fused(ours, case, ALL_SCHEDULES[schedule]), eager(plain, case)
    assert_same([z, *gradients(z, ours).values()], [exact, *gradients(exact, plain).values()], 1e-10)


@every_act
@pytest.mark.parametrize("schedule", ["block_end", "moments"])
@pytest.mark.parametrize("case", ["basic block", "bottleneck, external residual"])
def test_second_derivatives_of_chains(case, schedule, act):
    case = replace(CASES[case], act=act, inner=act)
    ours = tensors_of(case)
    plain = ours.to(torch.float64)
    first, second = (fused(ours, case, ALL_SCHEDULES[schedule]), ours), (eager(plain, case), plain)
    assert_same(*(twice(z, wanted(tensors), tensors.dz) for z, tensors in (first, second)))


def draw(*shape, seed):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_()


def norm_of(channels, seed, *, training):
    running = draw(channels, seed=seed + 2).detach(), draw(channels, seed=seed + 3).detach().square() + 0.5
    numbers = NormNumbers(batch_stats=training)
    return Norm(draw(channels, seed=seed), draw(channels, seed=seed + 1), *running, numbers=numbers)


def layer_of(k, c, act, seed, *, size=1, stride=1, training=True):
    geometry = Geometry((stride, stride), (size // 2, size // 2))
    return Layer(draw(k, c, size, size, seed=seed), geometry, norm_of(k, seed + 1, training=training), act=act)


def plain_norm(y, norm):
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    return batch_norm(y, mean, var, norm.gamma, norm.beta, norm.numbers.batch_stats, 0.1, norm.numbers.eps)


def plain_conv(u, layer):
    return conv2d(u, layer.weight, None, *layer.geometry)


def plain_layer(u, layer):
    return plain_norm(plain_conv(u, layer), layer.norm)


def plain_chain(x, layers, act, joining=None):
    u = x
    for layer in layers[:-1]:
        u = layer.act.value(plain_layer(u, layer))
    z = plain_layer(u, layers[-1])
    return act.value(z if joining is None else z + joining)


def leaves_of(x, layers, *norms):
    every = [x, *(t for layer in layers for t in layer.tensors), *(t for norm in norms for t in norm.tensors)]
    return [tensor for tensor in every if tensor is not None and tensor.requires_grad]


def assert_like(ours, plain, leaves, *, second=False):
    """The outputs and gradients of two functions of the same leaves."""
    found = []
    for run in (ours, plain):
        z = run()
        dz = draw(*z.shape, seed=99).detach()
        if second:
            found.append(twice(z, leaves, dz))
        else:
            found.append([z, *torch.autograd.grad(z, leaves, dz, allow_unused=True)])
    used = [i for i, grad in enumerate(found[1]) if grad is not None]
    assert all(grad is None or i in used for i, grad in enumerate(found[0]))
    assert_same(*([grads[i] for i in used] for grads in found))


@every_act
@every_rung
@pytest.mark.parametrize("training", [True, False], ids=["batch", "running"])
def test_a_block_behind_another_that_hands_over(training, schedule, act, each_backend):
    """What the first leaves, the second's last backward pass reduces."""
    x = draw(2, 6, 5, 4, seed=0)
    blocks = [[layer_of(6, 6, act, 10 * i + 5 * j, size=3, training=training) for j in range(2)] for i in (1, 2)]

    def ours():
        u = run_chain(x, blocks[0], shortcut=Identity(), act=act, schedule=schedule, hands_over=True)
        return run_chain(u, blocks[1], shortcut=Identity(), act=act, schedule=schedule)

    def plain():
        u = plain_chain(x, blocks[0], act, x)
        return plain_chain(u, blocks[1], act, u)

    assert_like(ours, plain, leaves_of(x, [*blocks[0], *blocks[1]]))


@every_act
@pytest.mark.parametrize("training", [True, False], ids=["batch", "running"])
def test_inference(training, act, each_backend):
    x, layers = draw(2, 6, 5, 4, seed=0), [layer_of(6, 6, act, 10 * i, size=3, training=training) for i in (1, 2)]
    with torch.no_grad():
        found = [run_chain(x, layers, shortcut=Identity(), act=act), plain_chain(x, layers, act, x)]
        norm = norm_of(6, 30, training=training)
        found += [run_bn_act(x, norm, act), act.value(plain_norm(x, norm))]
    assert_same(found[::2], found[1::2])


@every_act
@every_rung
@pytest.mark.parametrize("projected", [True, False], ids=["projection", "identity"])
def test_preactivation(projected, schedule, act, each_backend):
    x, norm = draw(2, 6, 5, 4, seed=0), norm_of(6, 1, training=True)
    bare = Layer.bare(draw(8 if projected else 6, 4, 3, 3, seed=30), Geometry((1, 1), (1, 1)))
    layers = [layer_of(4, 6, act, 10), bare]
    beside = Layer.bare(draw(8, 6, 1, 1, seed=40), Geometry()) if projected else None
    shortcut = Identity() if beside is None else Projection(beside)

    def plain():
        source = act.value(plain_norm(x, norm))
        z = plain_conv(act.value(plain_layer(source, layers[0])), bare)
        return z + (x if beside is None else plain_conv(source, beside))

    leaves = leaves_of(x, [layers[0], bare, *([beside] if beside else [])], norm)
    for second in (False, True):
        assert_like(
            lambda: run_preact(x, norm, layers, shortcut=shortcut, act=act, schedule=schedule),
            plain,
            leaves,
            second=second,
        )


@every_act
@every_rung
def test_dense_blocks(schedule, act, each_backend):
    x, parts, channels = draw(2, 6, 5, 4, seed=0), [], 6
    for i in (1, 2):
        bare = Layer.bare(draw(4, 5, 3, 3, seed=100 * i + 40), Geometry((1, 1), (1, 1)))
        norm = norm_of(channels, 100 * i, training=True)
        parts.append(DenseLayerParts(norm, (layer_of(5, channels, act, 100 * i + 10), bare), act))
        channels += 4

    def plain():
        features = x
        for norm, (inner, last), _ in parts:
            u = act.value(plain_layer(act.value(plain_norm(features, norm)), inner))
            features = torch.cat([features, plain_conv(u, last)], 1)
        return features

    leaves = leaves_of(x, [conv for part in parts for conv in part.convs], *(part.norm for part in parts))
    for second in (False, True):
        assert_like(lambda: run_dense(x, parts, schedule=schedule), plain, leaves, second=second)


@pytest.mark.parametrize("act", [*ACTS.values(), IDENTITY], ids=str)
@every_rung
@pytest.mark.parametrize("image", [True, False], ids=["image too", "parameters alone"])
def test_stems(image, schedule, act, each_backend):
    """In fp64 two values of a window are hardly ever as large."""
    x = draw(2, 3, 13, 12, seed=0).detach().requires_grad_(image)
    layer, pool = layer_of(6, 3, act, 1, size=5, stride=2), PoolGeometry()
    leaves = leaves_of(x, [layer])
    for second in (False, True):
        assert_like(
            lambda: run_stem(x, layer, pool, schedule=schedule),
            lambda: max_pool2d(act.value(plain_layer(x, layer)), *pool),
            leaves,
            second=second,
        )
    with torch.no_grad():
        frozen = layer._replace(norm=layer.norm._replace(numbers=NormNumbers(batch_stats=False)))
        assert_same([run_stem(x, frozen, pool)], [max_pool2d(act.value(plain_layer(x, frozen)), *pool)])


@every_act
@pytest.mark.parametrize("second", [False, True], ids=["gradients", "second derivatives"])
@pytest.mark.parametrize("end", ["sum", "sum with itself", "batch norm", "batch norm and sum"])
def test_block_ends(end, second, act, each_backend):
    x, residual, norm = draw(2, 6, 5, 4, seed=0), draw(2, 6, 5, 4, seed=1), norm_of(6, 2, training=True)
    vectors = [norm.gamma, norm.beta, norm.running_mean, norm.running_var]
    ours, plain, leaves = {
        "sum": (lambda: add_act(x, residual, act=act), lambda: x + residual, [x, residual]),
        "sum with itself": (lambda: add_act(x, x, act=act), lambda: x + x, [x]),
        "batch norm": (lambda: run_bn_act(x, norm, act), lambda: plain_norm(x, norm), leaves_of(x, [], norm)),
        "batch norm and sum": (
            lambda: bn_add_act(x, *vectors, residual, training=True, act=act),
            lambda: plain_norm(x, norm) + residual,
            [residual, *leaves_of(x, [], norm)],
        ),
    }[end]
    assert_like(ours, lambda: act.value(plain()), leaves, second=second)


@pytest.mark.parametrize("act", [SILU, RELU], ids=str)
def test_a_residual_that_is_the_input_itself_has_the_share_of_both(act):
    x, layer = draw(2, 6, 5, 4, seed=0), layer_of(6, 6, act, 1, size=3)
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    for second in (False, True):
        assert_like(
            lambda: run_chain(x, [layer], shortcut=Residual(x), act=act),
            lambda: act.value(plain_layer(x, layer) + x),
            leaves_of(x, [layer]),
            second=second,
        )
