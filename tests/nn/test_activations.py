"""Blocks with every activation: what their plain twins compute, on every schedule, by the formulas and on kernels."""

import copy

import pytest
import torch
from torch import nn

import fusedres
from fusedres.activation import NAMED, activation_of, elu, leaky_relu, module_of
from fusedres.plan.schedule import SCHEDULES
from tests.comparison import assert_as_accurate_as_eager, relative_error
from tests.nn.twins import assert_same_pass, plain_copy, randomised, run, tensor
from tests.vgpu_support import needs_vgpu

MODULES = {
    **{name: (lambda act=act: module_of(act)) for name, act in NAMED.items()},
    "a steep leaky_relu": lambda: nn.LeakyReLU(0.3),
    "a leaky_relu that falls": lambda: nn.LeakyReLU(-0.2),
    "a flat elu": lambda: nn.ELU(0.3),
}
# The projection is narrow enough for moments, and the input of the identity wide enough for its last layer's.
BLOCKS = {
    "basic, projection": (lambda: fusedres.nn.BasicBlock(6, 10, 2), (3, 6, 7, 5)),
    "bottleneck, identity": (lambda: fusedres.nn.Bottleneck(16, 4), (3, 16, 5, 7)),
    "bottleneck, projection": (lambda: fusedres.nn.Bottleneck(4, 4), (3, 4, 5, 7)),
}


def made(block, activation, dtype=torch.float64):
    """A block whose activations are all of one kind."""
    torch.manual_seed(0)
    make, _ = BLOCKS[block]
    module = randomised(make().to(dtype))
    module.relu = MODULES[activation]()
    return module


every = pytest.mark.parametrize("activation", MODULES)


@every
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_training_and_evaluation(block, activation, schedule, backend):
    fused = fusedres.fuse(made(block, activation), schedule=schedule)
    plain = plain_copy(fused)
    x = tensor(*BLOCKS[block][1]).to(memory_format=torch.channels_last)
    assert fusedres.report(fused).rows[0].fused
    with fusedres.backend(backend):
        for mode in (True, False):
            assert_same_pass(run(fused.train(mode), x), run(plain.train(mode), x))
        with torch.no_grad():
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-10, atol=1e-10)


@every
def test_another_activation_at_the_end(activation):
    layers = [fusedres.nn.ConvBNAct(4, 8, act=None), fusedres.nn.ConvBNAct(8, 16, 1)]
    layers[0].act = MODULES[activation]()
    for layer in layers:
        fused = fusedres.fuse(randomised(layer.double()), schedule="moments")
        plain = plain_copy(fused)
        x = tensor(2, layer.conv.in_channels, 5, 4)
        assert_same_pass(run(fused, x), run(plain, x))


ON_KERNELS = (
    ("basic, projection", "block_end"),
    ("basic, projection", "stats"),
    ("bottleneck, identity", "prologue"),
    ("bottleneck, projection", "moments"),
)


def on_kernels():
    """Each activation on each schedule; the quick tests take one of them for each."""
    for i, activation in enumerate(MODULES):
        for j, (block, schedule) in enumerate(ON_KERNELS):
            marks = () if i % len(ON_KERNELS) == j else (pytest.mark.slow,)
            yield pytest.param(block, schedule, activation, marks=marks)


@needs_vgpu
@pytest.mark.parametrize(("block", "schedule", "activation"), list(on_kernels()))
def test_on_kernels(block, schedule, activation, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    plain = made(block, activation, torch.float32)
    fused = fusedres.fuse(copy.deepcopy(plain), schedule=schedule)
    exact = copy.deepcopy(plain).double()
    x = tensor(*BLOCKS[block][1], dtype=torch.float32).to(memory_format=torch.channels_last)
    with fusedres.backend("vgpu:sm_90"), fusedres.record() as trace:
        ours = run(fused, x)
        with torch.no_grad():
            evaluated = fused.eval()(x)
    assert trace.launches
    theirs, right = run(plain, x), run(exact, x.double())
    assert_as_accurate_as_eager(ours.z, theirs.z, right.z)
    assert_as_accurate_as_eager(ours.dx, theirs.dx, right.dx)
    # Of a sum that all but cancels, eager's error is a matter of luck: it is measured by what was summed.
    largest = max(float(grad.norm()) for grad in right.grads.values())
    for name, grad in right.grads.items():
        scale = max(float(grad.norm()), 0.1 * largest)
        error, eager = (relative_error(of.grads[name], grad, scale) for of in (ours, theirs))
        assert error <= max(1.5 * eager, 5 * torch.finfo(torch.float32).eps), name
    with torch.no_grad():
        assert_as_accurate_as_eager(evaluated, plain.eval()(x), exact.eval()(x.double()))


@every
def test_networks_of_torchvision_keep_their_numbers(activation):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    plain = models.resnet18(num_classes=10).double()
    for module in plain.modules():
        if type(module) is models.resnet.BasicBlock:
            module.relu = MODULES[activation]()
    fused = fusedres.fuse(copy.deepcopy(plain))
    blocks = [row for row in fusedres.report(fused).rows if "layer" in row.name]
    assert len(blocks) == 8 and all(row.fused for row in blocks)
    x = tensor(4, 3, 96, 96)
    assert_same_pass(run(fused, x), run(plain, x), 1e-8)


def test_modules_and_names_agree():
    for name, act in NAMED.items():
        assert activation_of(module_of(act)) == act == fusedres.activation.activation_named(name)
    assert activation_of(nn.LeakyReLU(0.3)) == leaky_relu(0.3) != leaky_relu(0.2)
    assert activation_of(nn.ELU(0.3)) == elu(0.3) != elu()
    assert activation_of(nn.Sigmoid()) is None
