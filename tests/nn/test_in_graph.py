"""Compiled models: the fused passes are in the graph, in place of the layers, and give the numbers of eager mode."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_fw_bw_and_get_code
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet

import fusedres
from fusedres.models import cifar_resnet, densenet, preact_resnet, stochastic_resnet
from tests.comparison import relative_error
from tests.nn.graphs import Graphs, OwnBlock
from tests.nn.twins import randomised


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def timm_model(name):
    return pytest.importorskip("timm").create_model(name)


def backward(passes):
    """The passes of the backward graph of a forward graph."""
    return {f"{name}_backward": count for name, count in passes.items() if name != "move_statistics"}


def small_resnet(block=resnet.Bottleneck):
    return resnet.ResNet(block, [1, 1, 1, 1], num_classes=3)


def blocks():
    shortcut = nn.Sequential(nn.Conv2d(16, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
    return nn.Sequential(resnet.Bottleneck(16, 4), resnet.BasicBlock(16, 8, 2, shortcut))


# How a model is made, the size of its input, its passes, and what it leaves to PyTorch.
SMALL = {
    "blocks": (blocks, (16, 9, 9), {"conv_chain": 2}, {}),
    "own block": (lambda: nn.Sequential(OwnBlock()), (8, 9, 9), {"bn_prelu": 1, "conv_chain": 1}, {"convolution": 1}),
    "pre-activation": (lambda: preact_resnet(8, fused=False), (3, 8, 8),
                       {"conv_chain": 1, "preact": 3, "bn_add_act": 1}, {}),
    "network": pytest.param(small_resnet, (3, 32, 32), {"stem_pool": 1, "conv_chain": 4}, {}, marks=pytest.mark.slow),
}  # fmt: skip

# What eager blocks leave for each other (statistics, in a DenseNet) is measured by each again: another order of sums.
DENSE = (
    lambda: torchvision.models.DenseNet(4, (2, 2), 8, num_classes=3), (3, 32, 32),
    {"stem_pool": 1, "dense": 2, "preact": 1, "bn_add_act": 1},
)  # fmt: skip

LISTED = {
    "resnet18": (torchvision.models.resnet18, 64, {"stem_pool": 1, "conv_chain": 8}),
    "resnet50": (torchvision.models.resnet50, 64, {"stem_pool": 1, "conv_chain": 16}),
    "timm resnet50d": (lambda: timm_model("resnet50d"), 64, {"stem_pool": 1, "conv_chain": 20}),
    "cifar resnet-56": (lambda: cifar_resnet(56, fused=False), 32, {"conv_chain": 28}),
    "pre-activation": (lambda: preact_resnet(20, fused=False), 32, {"conv_chain": 1, "preact": 9, "bn_add_act": 1}),
    "densenet121": (torchvision.models.densenet121, 64, {"stem_pool": 1, "dense": 4, "preact": 3, "bn_add_act": 1}),
}
EVALUATED = {"stem_pool": "evaluated_stem"} | {
    name: f"evaluated_{name.removeprefix('conv_')}" for name in ("conv_chain", "preact", "dense")
}


def with_moves(passes):
    return {**passes, "move_statistics": sum(passes.values())}


def evaluated(passes):
    return {EVALUATED.get(name, name): count for name, count in passes.items()}


class Twins:
    """A fused model, compiled, and its copy, which runs in eager mode."""

    def __init__(self, make, backend, autocast=None, call=lambda model, x: model(x), **options):
        torch.manual_seed(0)
        self.fused = fusedres.fuse(randomised(make()), **options)
        self.eager = copy.deepcopy(self.fused)
        self.autocast = autocast
        self.call = call
        self.compiled = torch.compile(lambda x: call(self.fused, x), backend=backend, fullgraph=True)

    def step(self, *size):
        """The largest difference in outputs, gradients and buffers after a step of both, relative in norm."""
        ours = torch.randn(size).requires_grad_()
        theirs = ours.detach().clone().requires_grad_()
        with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
            z, w = self.compiled(ours), self.call(self.eager, theirs)
        assert z.dtype == w.dtype
        for model, out in ((self.fused, z), (self.eager, w)):
            model.zero_grad()
            out.float().square().mean().backward()
        pairs = [(z, w), (ours.grad, theirs.grad)]
        pairs += [(p.grad, q.grad) for p, q in zip(self.fused.parameters(), self.eager.parameters(), strict=True)]
        pairs += [(p, q) for p, q in zip(self.fused.buffers(), self.eager.buffers(), strict=True)]
        return max(relative_error(one, other) for one, other in pairs)

    def evaluation(self, *size):
        """The difference in evaluation."""
        x = torch.randn(size)
        self.fused.eval(), self.eager.eval()
        with torch.no_grad(), torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
            return relative_error(self.compiled(x), self.call(self.eager, x))


@pytest.mark.parametrize(
    "autocast", [None, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=["fp32", "autocast"]
)
@pytest.mark.parametrize(("make", "size", "passes", "left"), SMALL.values(), ids=SMALL)
def test_trains_and_evaluates_to_the_bit_as_in_eager_mode(make, size, passes, left, autocast):
    graphs = Graphs()
    twins = Twins(make, graphs.backend, autocast)
    # Means over pixels and the classifier are PyTorch's, in a graph by calls of its own.
    allowed = 0 if autocast is None or size[0] > 3 else 1e-7
    assert twins.step(2, *size) <= allowed
    assert graphs.passes(0) == {**with_moves(passes), **{f"aten.{name}": count for name, count in left.items()}}
    behind = {f"aten.{name}_backward": count for name, count in left.items()}
    assert graphs.passes(1) == {**backward(passes), **behind}
    assert twins.evaluation(2, *size) <= allowed
    assert not counters["graph_break"]


def test_a_batch_of_another_size_compiles_once_more_and_no_other():
    graphs = Graphs()
    twins = Twins(blocks, graphs.backend)
    for batch, compiled in ((2, 2), (3, 4), (5, 4), (7, 4)):
        assert twins.step(batch, 16, 9, 9) == 0
        assert len(graphs.modules) == compiled


def test_a_dense_network():
    make, size, passes = DENSE
    graphs = Graphs()
    twins = Twins(make, graphs.backend)
    assert twins.step(2, *size) < 1e-4
    assert graphs.passes(0) == with_moves(passes)
    assert not counters["graph_break"]


@pytest.mark.slow
def test_a_dense_network_without_a_stem():
    graphs = Graphs()
    twins = Twins(lambda: densenet(10, 4, fused=False), graphs.backend)
    assert twins.step(2, 3, 16, 16) < 1e-4
    assert graphs.passes(0)["dense"] == 3 and graphs.passes(0)["bn_add_act"] == 1


@pytest.mark.parametrize("schedule", [pytest.param("block_end", marks=pytest.mark.slow), "moments"])
def test_every_rung(schedule):
    twins = Twins(blocks, "aot_eager", schedule=schedule)
    assert twins.step(2, 16, 9, 9) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", LISTED)
def test_listed_models(name):
    make, size, passes = LISTED[name]
    graphs = Graphs()
    twins = Twins(make, graphs.backend)
    exact = "dense" not in passes
    for batch in (2, 3):
        # Gradients behind ReLUs of a hundred layers say little where sums differ in their order.
        error = twins.step(batch, 3, size, size)
        assert error == 0 if exact else error < 0.3
    for which in (0, 2):
        assert graphs.passes(which) == with_moves(passes) and graphs.passes(which + 1) == backward(passes)
    error = twins.evaluation(2, 3, size, size)
    assert error == 0 if exact else error < 1e-5
    assert graphs.passes(4) == evaluated(passes)
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "autocast"])
def test_inductor(autocast):
    twins = Twins(lambda: small_resnet(resnet.BasicBlock), "inductor", autocast)
    for batch in (2, 3, 5):
        # What lies between passes, the classifier and the loss, is Inductor's.
        assert twins.step(batch, 3, 32, 32) < (1e-5 if autocast is None else 1e-2)
    assert twins.evaluation(2, 3, 32, 32) < (1e-5 if autocast is None else 1e-2)


@pytest.mark.slow
def test_checkpointed():
    """Gradients are the same; a compiler moves statistics once, where eager mode moves them with every forward pass."""

    def call(model, x):
        x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            x = checkpoint(stage, x, use_reentrant=False)
        return model.fc(torch.flatten(model.avgpool(x), 1))

    twins = Twins(small_resnet, "aot_eager", call=call)
    twins.step(2, 3, 32, 32)
    grads = zip(twins.fused.parameters(), twins.eager.parameters(), strict=True)
    assert all(torch.equal(ours.grad, theirs.grad) for ours, theirs in grads)


@pytest.mark.slow
def test_inductor_computes_checkpointed_blocks_again():
    """Like the plain blocks that it compiles: statistics are moved once, and the backward graph has forward passes."""

    def step(model):
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x: checkpoint(model[1], checkpoint(model[0], x, use_reentrant=False), use_reentrant=False),
            fullgraph=True,
        )
        x = torch.randn(3, 16, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
        z, codes = run_fw_bw_and_get_code(lambda: compiled(x))
        return [z, x.grad, *(p.grad for p in model.parameters()), *model.buffers()], codes

    plain = randomised(blocks()).double()
    fused = fusedres.fuse(copy.deepcopy(plain))
    theirs, _ = step(plain)
    ours, (_, backward_code) = step(fused)
    assert max(relative_error(one, other) for one, other in zip(ours, theirs, strict=True)) < 1e-10
    lines = [line.strip() for line in backward_code.splitlines()]
    assert sum("fusedres.conv_chain.default(" in line and line[0] != "#" for line in lines if line) == 2


def block():
    return nn.Sequential(randomised(resnet.BasicBlock(8, 8)))


def test_what_is_changed_is_compiled_anew():
    graphs = Graphs()
    fused = fusedres.fuse(block())
    compiled = torch.compile(fused, backend=graphs.backend, fullgraph=True)
    x = torch.randn(2, 8, 6, 6)

    def assert_as_eager():
        twin = copy.deepcopy(fused)
        assert torch.equal(compiled(x), twin(x))
        assert all(map(torch.equal, fused.buffers(), twin.buffers()))

    assert_as_eager()
    fused[0].bn1.eval()
    assert_as_eager()
    fused[0].bn1.eps = 0.5
    assert_as_eager()
    fused[0].conv1.weight = nn.Parameter(torch.randn_like(fused[0].conv1.weight))
    assert_as_eager()
    fused[0].conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
    assert_as_eager()
    fused[0].relu = nn.SiLU()
    assert_as_eager()
    assert all(graphs.passes(which)["conv_chain"] == 1 for which in range(0, len(graphs.modules), 2))
    fusedres.unfuse(fused)
    assert_as_eager()
    assert "conv_chain" not in graphs.passes(-1)


@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16, "meta"])
def test_moved_after_it_was_compiled(to):
    fused = fusedres.fuse(block())
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    compiled(torch.randn(2, 8, 6, 6)).sum().backward()
    fused.to(to)
    x = torch.randn(2, 8, 6, 6).to(to)
    z = compiled(x)
    z.sum().backward()
    assert (z.dtype, z.device, z.shape) == (x.dtype, x.device, x.shape)
    if to != "meta":
        assert torch.equal(compiled(x), copy.deepcopy(fused)(x))


def test_blocks_that_somebody_looks_into_run_plain():
    fused = fusedres.fuse(nn.Sequential(*(resnet.BasicBlock(8, 8) for _ in range(2))))
    fused[0].conv1.register_forward_hook(lambda *_: None)
    graphs = Graphs()
    torch.compile(fused, backend=graphs.backend, fullgraph=True)(torch.randn(2, 8, 6, 6))
    found = graphs.passes(0)
    assert found["conv_chain"] == 1 and found["aten.convolution"] == 2


def test_hooks_between_passes_are_in_the_graph():
    """Of a module that runs as it is, inside of one whose forward was read."""

    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.between = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Sigmoid()

        def forward(self, x):
            return self.between(torch.relu(self.norm(self.conv(x))))

    fused = fusedres.fuse(nn.Sequential(Between()))
    graphs = Graphs()
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        z = torch.compile(fused, backend=graphs.backend, fullgraph=True)(x)
        assert graphs.passes(0)["conv_chain"] == 1
        fused[0].between.register_forward_hook(lambda module, args, out: out * 3)
        torch._dynamo.reset()
        tripled = torch.compile(fused, backend=graphs.backend, fullgraph=True)(x)
    assert torch.allclose(tripled, 3 * z, rtol=1e-5)
    assert "conv_chain" not in graphs.passes(1)


@pytest.mark.slow
def test_a_draw_is_made_at_every_call():
    fused = fusedres.fuse(stochastic_resnet(8, fused=False))
    x = torch.randn(2, 3, 8, 8)
    torch.manual_seed(3)
    compiled = torch.compile(fused, backend="aot_eager")
    assert len({float(compiled(x).detach().sum()) for _ in range(12)}) > 3
    graphs = Graphs()
    fused.eval()
    with torch.no_grad():
        z = torch.compile(fused, backend=graphs.backend, fullgraph=True)(x)
        assert torch.equal(z, fused(x))
    assert graphs.passes(0)["evaluated_chain"] == 4


def test_blocks_compiled_by_themselves():
    fused = fusedres.fuse(nn.Sequential(*(randomised(resnet.BasicBlock(8, 8), i) for i in range(3))))
    twin = copy.deepcopy(fused)
    graphs = Graphs()
    for one in fused:
        one.compile(backend=graphs.backend, fullgraph=True)
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(fused(x), twin(x))
    assert [graphs.passes(i) for i in range(0, len(graphs.modules), 1) if "conv_chain" in graphs.passes(i)] == [
        {"conv_chain": 1, "move_statistics": 1}
    ] * 3


def test_transforms_of_functions_get_the_plain_modules():
    fused = fusedres.fuse(block()).eval()
    x, parameters = torch.randn(2, 8, 6, 6), dict(fused.named_parameters())

    def gradients(parameters, x):
        return torch.func.grad(lambda p: torch.func.functional_call(fused, p, (x,)).square().sum())(parameters)

    graphs = Graphs()
    found = torch.compile(gradients, backend=graphs.backend, fullgraph=True)(parameters, x)
    expected = gradients(parameters, x)
    assert all(torch.equal(found[name], expected[name]) for name in parameters)
    assert not any("conv_chain" in graphs.passes(i) for i in range(len(graphs.modules)))
