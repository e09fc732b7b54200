"""fusedres.nn: dense blocks compute what their plain twins compute, measure each feature map once and copy none."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fusedres
from fusedres.nn import blocks, plain
from fusedres.patterns.choose import AUTO
from fusedres.runtime import replay
from fusedres.runtime.backends import backend
from tests.comparison import relative_error
from tests.nn.twins import assert_same_pass, assert_twins, plain_copy, randomised, run, tensor


class Case(NamedTuple):
    block: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    size: tuple[int, int, int, int]

    def make(self, schedule: str = AUTO, dtype: torch.dtype = torch.float64) -> nn.Module:
        torch.manual_seed(0)
        block = getattr(blocks, self.block)(*self.arguments, **self.keywords).to(dtype)
        return fusedres.fuse(randomised(block), schedule=schedule)


CASES = {
    "three bottlenecks": Case("DenseBlock", (3, 6, 4), {}, (3, 6, 5, 7)),
    "three layers": Case("DenseBlock", (3, 6, 4), {"bottleneck": None}, (3, 6, 5, 7)),
    "one layer, odd growth": Case("DenseBlock", (1, 6, 3), {"bottleneck": 2}, (3, 6, 5, 7)),
    "one pixel an image": Case("DenseBlock", (2, 3, 2), {}, (5, 3, 1, 1)),
    "transition": Case("Transition", (6, 3), {}, (3, 6, 6, 8)),
    "transition, a row and a column left over": Case("Transition", (6, 3), {}, (3, 6, 7, 5)),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
BLOCK = CASES["three bottlenecks"]


@cases
@pytest.mark.parametrize("schedule", [AUTO, "block_end", "stats", "prologue"])
def test_training_and_evaluation(case, schedule, each_backend):
    fused = case.make(schedule)
    twin = plain_copy(fused)
    assert fusedres.report(fused)[0].fused and not fusedres.report(twin)[0].fused
    assert_twins(fused, twin, tensor(*case.size), tensor(*case.size, seed=2))
    assert_twins(fused.eval(), twin.eval(), tensor(*case.size, seed=3))
    with torch.no_grad():
        assert relative_error(fused(tensor(*case.size)), twin(tensor(*case.size))) <= 1e-12


def norms(block: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]


def in_eval(choose: Callable[[list[nn.BatchNorm2d]], list[nn.BatchNorm2d]]) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        for norm in choose(norms(block)):
            norm.eval()

    return change


def frozen(choose: Callable[[str], bool]) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(not choose(name))

    return change


def different_eps(block: nn.Module) -> None:
    for i, norm in enumerate(norms(block)):
        norm.eps = 0.1 * (i + 1)


VARIANTS = {
    "batch norms frozen": in_eval(lambda all_: all_),
    "one batch norm of the features frozen": in_eval(lambda all_: all_[2:3]),
    "one bottleneck's frozen": in_eval(lambda all_: all_[1:2]),
    "all but the last frozen": in_eval(lambda all_: all_[:-1]),
    "every eps another": different_eps,
    "convolutions take no gradient": frozen(lambda name: "conv" in name),
    "batch norms take no gradient": frozen(lambda name: "norm" in name),
    "only the second layer does": frozen(lambda name: "denselayer2" not in name),
    "none does": frozen(lambda name: True),
}


@pytest.mark.parametrize("schedule", [AUTO, "stats", "prologue"])
@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS)
def test_kinds_of_batch_norm_and_what_takes_gradients(schedule, change):
    fused = BLOCK.make(schedule)
    change(fused)
    twin = plain_copy(fused)
    assert fusedres.report(fused)[0].fused
    assert_twins(fused, twin, tensor(*BLOCK.size), tensor(*BLOCK.size, seed=2))
    for module in (fused, twin):  # an image that asks for no gradient
        module.zero_grad()
        z = module(tensor(*BLOCK.size))
        if z.requires_grad:
            z.square().sum().backward()
    for (name, ours), theirs in zip(fused.named_parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            assert relative_error(ours.grad, theirs.grad, max(float(theirs.grad.norm()), 1e-3)) <= 1e-10, name


@pytest.mark.parametrize("schedule", [AUTO, "prologue"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_as_accurate_as_eager(schedule, dtype):
    """RMS over seeds; with a mean of ten deviations, which sums of squares and late corrections would lose."""
    squares: dict[str, list[float]] = {}
    for seed in range(3):
        fused = BLOCK.make(schedule, torch.float32).to(dtype)
        twin, exact = plain_copy(fused), plain_copy(fused).double()
        x = (tensor(4, 6, 8, 8, seed=seed) + 10).to(dtype)
        ours, theirs, truth = run(fused, x), run(twin, x), run(exact, x.double())
        for name in ("z", "dx"):
            for who, done in (("ours", ours), ("theirs", theirs)):
                squares.setdefault(f"{who} {name}", []).append(
                    relative_error(getattr(done, name), getattr(truth, name)) ** 2
                )
        for who, done in (("ours", ours), ("theirs", theirs)):
            grads, exacts = (torch.cat([g.flatten().double() for g in d.grads.values()]) for d in (done, truth))
            squares.setdefault(f"{who} gradients", []).append(relative_error(grads, exacts) ** 2)
    for name in ("z", "dx", "gradients"):
        error, eager = ((sum(squares[f"{who} {name}"]) / 3) ** 0.5 for who in ("ours", "theirs"))
        assert error <= max(1.5 * eager, 4 * torch.finfo(dtype).eps), (name, error, eager)


def test_fp32_features_under_autocast_take_the_plain_pass():
    fused = BLOCK.make(dtype=torch.float32)
    twin = plain_copy(fused)
    x = tensor(*BLOCK.size, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = run(fused, x), run(twin, x)
        assert fused(x.bfloat16()).dtype == twin(x.bfloat16()).dtype
    assert ours.z.dtype == theirs.z.dtype and torch.equal(ours.z, theirs.z)


@pytest.mark.parametrize("schedule", ["stats", "prologue"])
def test_each_feature_map_is_measured_once(schedule, monkeypatch):
    """The input by its producer or, here, by one pass; the layers' outputs by their convolutions."""
    from fusedres.autograd import dense, ends, preact

    seen: list[int] = []
    for module in (dense, preact, ends):
        original = module.bn_statistics
        monkeypatch.setattr(
            module, "bn_statistics", lambda y, original=original: (seen.append(y.shape[1]), original(y))[1]
        )
    torch.manual_seed(0)
    model = nn.Sequential(
        blocks.DenseBlock(3, 6, 4), blocks.Transition(18, 9), blocks.DenseBlock(2, 9, 4), blocks.BNAct(17)
    )
    fusedres.fuse(randomised(model).double(), schedule=schedule)
    twin = plain_copy(model)
    with replay.off():
        assert_twins(model, twin, tensor(3, 6, 6, 8))
    assert seen == [6, 9], "the first block's input, and what the pooling put out"


def test_a_pooling_joined_to_its_convolution_is_measured_as_it_is_written(monkeypatch):
    from fusedres.autograd import dense

    torch.manual_seed(0)
    model = nn.Sequential(blocks.Transition(6, 4), blocks.DenseBlock(2, 4, 4))
    fusedres.fuse(randomised(model).double(), schedule="prologue")
    twin = plain_copy(model)
    monkeypatch.setattr(dense, "bn_statistics", None)
    with backend("reference"):
        assert_twins(model, twin, tensor(3, 6, 6, 8))


POOLINGS = {
    "of two by two": (lambda: nn.AvgPool2d(2), True),
    "overlapping": (lambda: nn.AvgPool2d((2, 4), stride=(1, 2)), True),
    "of nine pixels": (lambda: nn.AvgPool2d(3), False),
    "padded": (lambda: nn.AvgPool2d(2, padding=1), False),
    "of what is left over too": (lambda: nn.AvgPool2d(2, ceil_mode=True), False),
    "divided by another number": (lambda: nn.AvgPool2d(2, divisor_override=3), False),
    "of maxima": (lambda: nn.MaxPool2d(2), False),
}


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize(("pool", "joins"), POOLINGS.values(), ids=POOLINGS)
def test_which_poolings_are_joined_to_their_convolution(pool, joins, hooked):
    fused, seen = CASES["transition"].make("prologue"), []
    fused.pool = pool()
    twin = plain_copy(fused)
    if hooked:
        fused.pool.register_forward_hook(lambda *_: seen.append(True))
    with backend("reference"):
        assert_twins(fused, twin, tensor(3, 6, 7, 8), tensor(3, 6, 7, 8, seed=2))
        assert bool(seen) == hooked

        with Pooled() as pooled:
            fused(tensor(3, 6, 7, 8))
        assert pooled.apart == (hooked or not joins)


class Pooled(TorchDispatchMode):
    """Whether somebody pools in a pass of its own."""

    apart = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.apart |= func in (torch.ops.aten.avg_pool2d.default, torch.ops.aten.max_pool2d_with_indices.default)
        return func(*args, **(kwargs or {}))


def test_nothing_is_concatenated(monkeypatch):
    fused = BLOCK.make("prologue")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("torch.cat was called")

    monkeypatch.setattr(torch, "cat", refuse)
    z = fused(tensor(*BLOCK.size).requires_grad_())
    z.sum().backward()
    assert z.is_contiguous(memory_format=torch.channels_last)


class Copies(TorchDispatchMode):
    """Channels of the activations that the library copies, and how many bytes that moves."""

    def __init__(self) -> None:
        super().__init__()
        self.channels: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        copies = ("clone", "copy_", "_to_copy", "contiguous", "addcmul", "cat")
        if func.overloadpacket.__name__ in copies and out.dim() == 4 and out.shape[2] > 3:
            self.channels.append(out.shape[1])
        return out


def test_kernels_take_features_where_they_lie():
    """What is copied is the block's input, into the buffer, and the last feature map's gradient, out of dz."""
    with torch.device("meta"):
        fused = fusedres.fuse(blocks.DenseBlock(4, 24, 12), schedule="prologue")
        x = torch.empty(2, 24, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
        dz = torch.empty(2, 72, 8, 8).contiguous(memory_format=torch.channels_last)
    with fusedres.record() as trace, Copies() as copies:
        fused(x).backward(dz)
    assert copies.channels == [24, 12]
    assert trace.by_kernel()["conv_input_grad_kernel"] == 8 and trace.by_kernel()["bn_backward_apply_kernel"] == 4
    into = [launch for launch in trace.launches if "onto_ptr" in launch.read]
    assert [launch.read["onto_ptr"] for launch in into] == [4 * 2 * 64 * c for c in (60, 48, 36, 24)]


def test_one_buffer_and_the_bottlenecks_are_saved():
    fused = BLOCK.make("prologue")
    held: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        held[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fused(tensor(*BLOCK.size).requires_grad_())
    weights = {p.data_ptr() for p in fused.parameters()}
    whole = [t for t in held.values() if t.untyped_storage().nbytes() >= t.numel() * t.element_size()]
    activations = sorted(t.shape[1] for t in whole if t.dim() == 4 and t.data_ptr() not in weights)
    assert activations == [16, 16, 16, 18]


LEFT_ALONE = {
    "dropout": (lambda b: setattr(b.denselayer2, "drop_rate", 0.2), "denselayer2 drops values"),
    "hook on a layer": (lambda b: b.denselayer1.register_forward_hook(lambda *_: None), "denselayer1 has hooks"),
    "hook inside": (lambda b: b.denselayer1.conv2.register_forward_hook(lambda *_: None), "conv2 has hooks"),
    "another activation": (lambda b: setattr(b.denselayer3, "relu2", nn.SiLU()), "denselayer3.relu2 is a SiLU"),
    "biased": (lambda b: setattr(b.denselayer1, "conv2", nn.Conv2d(16, 4, 3, padding=1)), "conv2 has a bias"),
}


@pytest.mark.parametrize(("change", "reason"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone_with_the_reason(change, reason):
    block = BLOCK.make()
    change(block)
    row = fusedres.report(block)[0]
    assert not row.fused and reason in row.reason


def test_dropout_is_fused_in_evaluation():
    block = fusedres.fuse(plain.DenseBlock(2, 6, 4, dropout=0.2).eval())
    assert fusedres.report(block)[0].fused
    assert not fusedres.report(block.train())[0].fused


@pytest.mark.parametrize("schedule", [AUTO, "prologue"])
def test_torchvisions_densenet(schedule):
    densenet = pytest.importorskip("torchvision").models.densenet
    torch.manual_seed(0)
    model = randomised(densenet.DenseNet(8, (2, 3), 12, num_classes=5)).double()
    twin = plain_copy(fusedres.fuse(model, schedule=schedule))
    rows = list(fusedres.report(model))
    assert [row.kind for row in rows] == ["DenseNet", "_DenseBlock", "_Transition", "_DenseBlock"]
    assert all(row.fused for row in rows)
    x = tensor(2, 3, 40, 40)
    assert_twins(model, twin, x, tensor(2, 3, 40, 40, seed=2), tolerance=1e-9)
    assert_twins(model.eval(), twin.eval(), x, tolerance=1e-9)
    assert type(fusedres.unfuse(model)) is densenet.DenseNet


def test_torchvisions_memory_efficient_layers_keep_their_frugality():
    densenet = pytest.importorskip("torchvision").models.densenet
    block = fusedres.fuse(densenet._DenseBlock(2, 6, 2, 4, 0.0, memory_efficient=True).double())
    passes = [run(module, tensor(*BLOCK.size)) for module in (block, plain_copy(block))]
    # torchvision's checkpointing moves running statistics once more in backward, the fused block does not.
    assert_same_pass(*(done._replace(buffers={}) for done in passes))
    assert block._schedule() == "prologue"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_on_executed_kernels(dtype):
    """Two blocks with a transition between: slices read, written and added to in place, and a pooling joined."""
    pytest.importorskip("llvmlite")
    torch.manual_seed(0)
    model = nn.Sequential(blocks.DenseBlock(3, 16, 16), blocks.Transition(64, 32), blocks.DenseBlock(2, 32, 12))
    fused = fusedres.fuse(randomised(model), schedule="prologue").to(dtype)
    twin, exact = plain_copy(fused), plain_copy(fused).double()
    x = tensor(2, 16, 10, 8, dtype=dtype)
    with torch.backends.cudnn.flags(allow_tf32=False), backend("vgpu:sm_90"), fusedres.record() as trace:
        ours = run(fused, x)
    assert {launch.name for launch in trace.launches if "onto_ptr" in launch.read} == {
        "conv_input_grad_kernel" if dtype == torch.float32 else "conv_backward_kernel"
    }
    theirs, truth = run(twin, x), run(exact, x.double())
    assert relative_error(ours.z, truth.z) <= max(1.5 * relative_error(theirs.z, truth.z), 1e-6)
    assert relative_error(ours.dx, truth.dx) <= max(1.5 * relative_error(theirs.dx, truth.dx), 1e-5)
    flat = [torch.cat([grad.flatten().double() for grad in done.grads.values()]) for done in (ours, theirs, truth)]
    assert relative_error(flat[0], flat[2]) <= max(1.5 * relative_error(flat[1], flat[2]), 1e-5)
    if dtype == torch.float32:
        for name, grad in truth.grads.items():
            eager = relative_error(theirs.grads[name], grad)
            assert relative_error(ours.grads[name], grad) <= max(1.5 * eager, 1e-5), name
