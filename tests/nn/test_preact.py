"""fusedres.nn: pre-activation blocks compute what their plain twins compute, and measure their outputs once."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres.autograd.handover import statistics
from fusedres.nn import blocks
from fusedres.patterns.choose import AUTO
from fusedres.plan.schedule import SCHEDULES
from fusedres.runtime import replay
from fusedres.runtime.backends import backend
from tests.comparison import relative_error
from tests.nn.twins import assert_same_pass, assert_twins, plain_copy, randomised, run, tensor

EVERY_SCHEDULE = [AUTO, *(name for name in SCHEDULES if name != "moments")]
"""Nothing here has a moments form: no batch norm follows a block's last convolution."""
schedules = pytest.mark.parametrize("schedule", EVERY_SCHEDULE)


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
    "basic": Case("PreActBasicBlock", (6, 6), {}, (3, 6, 5, 7)),
    "basic, strided projection": Case("PreActBasicBlock", (6, 8, 2), {}, (3, 6, 5, 7)),
    "basic, zero-pad, odd difference": Case("PreActBasicBlock", (6, 9, 2), {"shortcut": "zero_pad"}, (3, 6, 5, 7)),
    "basic, activated before": Case("PreActBasicBlock", (6, 6), {"preact": False}, (3, 6, 5, 7)),
    "bottleneck": Case("PreActBottleneck", (16, 4), {}, (3, 16, 5, 7)),
    "bottleneck, one pixel an image": Case("PreActBottleneck", (16, 4), {}, (5, 16, 1, 1)),
    "bottleneck, strided projection": Case("PreActBottleneck", (6, 4, 2), {}, (3, 6, 5, 7)),
    "bottleneck, projection of what is activated": Case("PreActBottleneck", (6, 4), {"preact": False}, (3, 6, 5, 7)),
    "bottleneck, zero-pad": Case("PreActBottleneck", (6, 4, 2), {"shortcut": "zero_pad"}, (3, 6, 5, 7)),
    "bottleneck, projection always": Case(
        "PreActBottleneck", (16, 4), {"shortcut": "projection_always"}, (3, 16, 5, 7)
    ),
    "batch norm and ReLU": Case("BNAct", (6,), {}, (3, 6, 5, 7)),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@cases
@schedules
def test_training_and_evaluation(case, schedule, each_backend):
    """Two batches, so that running statistics and counters are compared too, then eval with and without gradients."""
    fused = case.make(schedule)
    plain = plain_copy(fused)
    assert fusedres.report(fused)[0].fused and not fusedres.report(plain)[0].fused
    assert_twins(fused, plain, tensor(*case.size), tensor(*case.size, seed=2))
    assert_twins(fused.eval(), plain.eval(), tensor(*case.size, seed=3))
    with torch.no_grad():
        assert relative_error(fused(tensor(*case.size)), plain(tensor(*case.size))) <= 1e-12


def frozen(choose: Callable[[str], bool]) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(not choose(name))

    return change


def norms_in_eval(block: nn.Module) -> None:
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def first_norm_in_eval(block: Any) -> None:
    block.bn1.eval()


def biased(block: Any) -> None:
    block.conv1.bias = nn.Parameter(tensor(block.conv1.out_channels, seed=3))


def not_affine(block: Any) -> None:
    block.bn1 = nn.BatchNorm2d(block.bn1.num_features, affine=False).double()


def without_beta(block: Any) -> None:
    block.bn1.register_parameter("bias", None)


VARIANTS = {
    "batch norms frozen": norms_in_eval,
    "first batch norm frozen": first_norm_in_eval,
    "first batch norm frozen, without gradients": lambda b: (first_norm_in_eval(b), b.bn1.requires_grad_(False)),
    "first convolution biased": biased,
    "first batch norm without parameters": not_affine,
    "first batch norm without beta": without_beta,
    "convolutions take no gradient": frozen(lambda name: "conv" in name or "downsample" in name),
    "batch norms take no gradient": frozen(lambda name: "bn" in name),
    "only the first batch norm does": frozen(lambda name: "bn1" not in name),
    "only the last convolution does": frozen(lambda name: not name.startswith(("conv2", "conv3"))),
    "none does": frozen(lambda name: True),
}


@pytest.mark.parametrize(
    "case", [CASES["basic"], CASES["bottleneck, strided projection"]], ids=["identity", "projection"]
)
@pytest.mark.parametrize("schedule", [AUTO, "stats", "prologue"])
@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS)
def test_kinds_of_batch_norm_and_what_takes_gradients(case, schedule, change):
    fused = case.make(schedule)
    change(fused)
    plain = plain_copy(fused)
    assert fusedres.report(fused)[0].fused
    assert_twins(fused, plain, tensor(*case.size), tensor(*case.size, seed=2))
    for module in (fused, plain):  # an image that asks for no gradient
        module.zero_grad()
        z = module(tensor(*case.size))
        if z.requires_grad:
            z.sum().backward()
    for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            assert relative_error(ours.grad, theirs.grad, max(float(theirs.grad.norm()), 1e-3)) <= 1e-10, name


@pytest.mark.parametrize("schedule", [AUTO, "prologue"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32 input", "bf16 input"])
def test_autocast_bf16(schedule, dtype):
    """Dtypes are eager's, and the values as close to fp64's."""
    fused = CASES["bottleneck"].make(schedule, torch.float32)
    plain, exact = plain_copy(fused), plain_copy(fused).double()
    x = tensor(4, 16, 8, 8, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = run(fused, x), run(plain, x)
    truth = run(exact, x.double())
    assert ours.z.dtype == theirs.z.dtype and ours.dx.dtype == theirs.dx.dtype
    for name in ("z", "dx"):
        error, eager = (relative_error(getattr(p, name), getattr(truth, name)) for p in (ours, theirs))
        assert error <= max(1.5 * eager, 2**-8), name
    grads = [torch.cat([g.flatten().double() for g in p.grads.values()]) for p in (ours, theirs, truth)]
    assert relative_error(grads[0], grads[2]) <= 1.5 * relative_error(grads[1], grads[2])


LEFT_ALONE = {
    "hook on a convolution": (lambda b: b.conv3.register_forward_hook(lambda *_: None), "conv3 has hooks"),
    "hook on the first batch norm": (lambda b: b.bn1.register_forward_hook(lambda *_: None), "bn1 has hooks"),
    "biased last convolution": (lambda b: setattr(b, "conv3", nn.Conv2d(4, 16, 1)), "conv3 has a bias"),
    "another activation": (lambda b: setattr(b, "relu", nn.SiLU()), "relu is a SiLU"),
    "another shortcut": (lambda b: setattr(b, "downsample", nn.AvgPool2d(1)), "downsample is a AvgPool2d"),
    "dropout": (lambda b: setattr(b, "dropout", nn.Dropout(0.5)), "dropout stands between"),
}


@pytest.mark.parametrize(("change", "reason"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone_with_the_reason(change, reason):
    block = CASES["bottleneck"].make()
    change(block)
    row = fusedres.report(block)[0]
    assert not row.fused and reason in row.reason


def test_dropout_is_the_plain_one_in_training_and_fused_in_evaluation():
    block = randomised(blocks.PreActBasicBlock(6, 6, dropout=0.3).double())
    plain = plain_copy(block)
    passes = []
    for module in (block, plain):
        torch.manual_seed(5)
        passes.append(run(module, tensor(3, 6, 5, 7)))
    assert_same_pass(*passes)
    assert not fusedres.report(block)[0].fused
    assert fusedres.report(block.eval())[0].fused
    assert_twins(block, plain.eval(), tensor(3, 6, 5, 7))


def stage(schedule: str = "prologue") -> nn.Sequential:
    """A run of blocks and the batch norm behind it."""
    torch.manual_seed(0)
    parts = (
        blocks.PreActBottleneck(6, 4, preact=False), blocks.PreActBottleneck(16, 4),
        blocks.PreActBottleneck(16, 5, 2), blocks.PreActBottleneck(20, 5), blocks.BNAct(20),
    )  # fmt: skip
    return fusedres.fuse(randomised(nn.Sequential(*parts)).double(), schedule=schedule)


X = (3, 6, 6, 6)


@pytest.fixture
def measured(monkeypatch) -> Iterator[list[Tensor]]:
    """Every tensor that a pass of its own measured."""
    from fusedres.autograd import ends, layer, preact

    seen: list[Tensor] = []
    for module in (preact, ends, layer):
        original = module.bn_statistics
        monkeypatch.setattr(module, "bn_statistics", lambda y, original=original: (seen.append(y), original(y))[1])
    with replay.off():
        yield seen


@pytest.mark.parametrize("schedule", ["stats", "prologue"])
def test_no_pass_measures_a_blocks_output(schedule, measured):
    fused = stage(schedule)
    plain = plain_copy(fused)
    assert_twins(fused, plain, tensor(*X), tensor(*X, seed=2))
    assert measured == []


def in_place(module: nn.Module, inputs: Any, output: Tensor) -> None:
    with torch.no_grad():
        output.mul_(0.5).add_(1.0)


HOOKS = {
    "another output": lambda module, inputs, output: output * 0.5 + 1,
    "written in place": in_place,
    "a view": lambda module, inputs, output: output.view_as(output),
    "nothing": lambda module, inputs, output: None,
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_hooks_between_blocks_are_seen_by_the_statistics(hook, measured):
    fused = stage()
    plain = plain_copy(fused)
    for model in (fused, plain):
        for part in model[:-1]:  # eager itself refuses a write to what a ReLU put out
            part.register_forward_hook(hook)
    done = []
    for model in (fused, plain):
        done.append(run(model, tensor(*X)))
    assert_same_pass(*done)
    # Three blocks and the batch norm read what a hook may have changed.
    assert len(measured) == (0 if hook is HOOKS["nothing"] else 4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("pieces", ["blocks", "whole"])
def test_checkpointing(pieces, reentrant):
    fused = stage()
    plain = plain_copy(fused)

    class Checkpointed(nn.Module):
        def __init__(self, model: nn.Sequential) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            for part in self.model if pieces == "blocks" else [self.model]:
                x = checkpoint(part, x, use_reentrant=reentrant)
            return x

    # Running statistics move twice under checkpointing, in eager too.
    assert_twins(Checkpointed(fused), Checkpointed(plain), tensor(*X))


def test_statistics_die_with_their_tensor_and_are_taken_once():
    statistics._entries.clear()
    block = CASES["bottleneck"].make("prologue")
    z = block(tensor(3, 16, 5, 7))
    assert len(statistics._entries) == 1
    partials = statistics.take(z)
    assert partials is not None and statistics.take(z) is None
    exact = z.detach()
    assert relative_error(partials.mean.mean(0), exact.mean((0, 2, 3))) <= 1e-12
    z = block(tensor(3, 16, 5, 7))
    del z
    assert len(statistics._entries) == 0


def test_statistics_of_a_tensor_written_to_are_not_taken():
    block = CASES["bottleneck"].make("prologue")
    with torch.no_grad():
        z = block(tensor(3, 16, 5, 7))
        z[0, 0, 0, 0] = 7.0
    assert statistics.take(z) is None


def test_only_raw_tensors_are_saved():
    """Of a bottleneck in the middle of a stage: x, y1 and y2, and vectors."""
    block = CASES["bottleneck"].make("prologue")
    held: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        held[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        z = block(tensor(3, 16, 5, 7).requires_grad_())
    weights = {p.data_ptr() for p in block.parameters()}
    whole = [t for t in held.values() if t.untyped_storage().nbytes() >= t.numel() * t.element_size()]
    activations = sorted(t.shape[1] for t in whole if t.dim() == 4 and t.data_ptr() not in weights)
    assert activations == [4, 4, 16]
    z.sum().backward()


@pytest.mark.parametrize("target", ["vgpu:sm_90"])
@pytest.mark.slow
def test_on_executed_kernels(target):
    """The whole stage on compiled kernels, as accurate as eager is."""
    pytest.importorskip("llvmlite")
    fused = stage().float()
    plain, exact = plain_copy(fused), plain_copy(fused).double()
    x = tensor(*X, dtype=torch.float32)
    with torch.backends.cudnn.flags(allow_tf32=False), backend(target):
        ours = run(fused, x)
    theirs, truth = run(plain, x), run(exact, x.double())
    assert relative_error(ours.z, truth.z) <= max(1.5 * relative_error(theirs.z, truth.z), 1e-6)
    for name, grad in truth.grads.items():
        allowed = max(1.5 * relative_error(theirs.grads[name], grad), 1e-5)
        assert relative_error(ours.grads[name], grad) <= allowed, name


@pytest.fixture
def one_process(tmp_path) -> Iterator[None]:
    """A process group of this process alone, as DistributedDataParallel needs one."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("schedule", [AUTO, "prologue"])
def test_distributed_data_parallel(schedule, one_process):
    """Its hooks see every parameter's gradient, and its buffers are those of the blocks."""
    fused = nn.Sequential(*stage(schedule), blocks.DenseBlock(2, 20, 4).double(), blocks.Transition(28, 10).double())
    fusedres.fuse(fused, schedule=schedule)
    plain = plain_copy(fused)
    parallel = [nn.parallel.DistributedDataParallel(model) for model in (fused, plain)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of gradients laid out otherwise than parameters
        passes = [run(model, tensor(3, 6, 8, 8)) for model in parallel]
    assert_same_pass(*passes)
    assert all(grad is not None for grad in passes[0].grads.values())
