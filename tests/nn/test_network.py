"""fusedres.nn.network: blocks that hand over compute what plain ones do, and only where nobody looks between them."""

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres.autograd import handover
from fusedres.models import cifar_resnet
from fusedres.nn import blocks, plain
from fusedres.nn.chain import FusedBlock
from fusedres.nn.network import Bystander, through
from fusedres.runtime.backends import backend
from tests.comparison import assert_as_accurate_as_eager, relative_error
from tests.nn.twins import assert_same_pass, randomised, run, tensor
from tests.vgpu_support import needs_vgpu

X = (3, 4, 8, 6)


def basic(*rows: tuple[int, int, int], shortcut: str = "projection") -> list[nn.Module]:
    """Blocks from their input channels, channels and strides."""
    return [plain.BasicBlock(*row, shortcut=shortcut) for row in rows]


class Walked(nn.Sequential):
    """A network of one stage, which its forward goes through as the networks of the library do."""

    def forward(self, x: Tensor) -> Tensor:
        stage = nn.Sequential()
        stage.__dict__.update({**self.__dict__, "_modules": self._modules})
        return through(stage, x)


SAME, WIDER = (8, 8, 1), (4, 8, 2)
STAGES = {
    "projection first": lambda: basic(WIDER, SAME, SAME),
    "zero-pad first": lambda: basic(WIDER, SAME, SAME, shortcut="zero_pad"),
    "projection inside": lambda: basic((4, 4, 1), WIDER, SAME),
    "zero-pad inside": lambda: basic((4, 4, 1), WIDER, SAME, shortcut="zero_pad"),
    "no shortcuts": lambda: basic(*[(4, 4, 1)] * 3, shortcut="none"),
    "bottlenecks": lambda: [plain.Bottleneck(4, 2), plain.Bottleneck(8, 2), plain.Bottleneck(8, 2)],
    "one of another kind": lambda: [*basic((4, 4, 1)), nn.Tanh(), *basic((4, 4, 1), (4, 4, 1))],
}
HANDED = {"one of another kind": 1}


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The gradients that arrived reduced."""
    found, take = [], handover.reduced.take

    def taken(gradient: Tensor):
        sums = take(gradient)
        if sums is not None:
            found.append(gradient)
        return sums

    monkeypatch.setattr(handover.reduced, "take", taken)
    return found


def twins(name: str = "projection first", schedule: str = "prologue") -> tuple[Walked, Walked]:
    """A fused stage and the same in plain modules."""
    torch.manual_seed(0)
    stage = randomised(Walked(*STAGES[name]()).double())
    return fusedres.fuse(copy.deepcopy(stage), schedule=schedule), stage


def assert_same(fused: nn.Module, exact: nn.Module, x: Tensor | None = None) -> None:
    x = tensor(*X) if x is None else x
    with backend("reference"):
        assert_same_pass(run(fused, x), run(exact, x))


@pytest.mark.parametrize("schedule", ["stats", "prologue"])
@pytest.mark.parametrize("stage", STAGES)
def test_is_the_plain_stage(stage: str, schedule: str, handed: list[Tensor]) -> None:
    fused, exact = twins(stage, schedule)
    assert_same(fused, exact)
    assert len(handed) == HANDED.get(stage, 2)


@pytest.mark.parametrize(("schedule", "count"), [("block_end", 0), ("moments", 0), ("auto", 0)])
def test_nothing_is_handed_over_where_there_is_no_pass_to_spare(
    schedule: str, count: int, handed: list[Tensor]
) -> None:
    """Sums in passes of their own; outputs never written; the library's schedule, which fp64 has."""
    fused, exact = twins("bottlenecks", schedule)
    assert_same(fused, exact)
    assert len(handed) == count


def test_what_arrives_is_behind_the_relu_and_its_sums_are_not_of_what_was_written_to(handed: list[Tensor]) -> None:
    fused, _ = twins()
    with backend("reference"):
        run(fused, tensor(*X))
    assert all(bool((gradient == 0).any()) for gradient in handed)
    gradient = handed[0].clone()
    handover.reduced.leave(gradient, "sums")  # type: ignore[arg-type]
    gradient.mul_(2)
    assert handover.reduced.take(gradient) is None


def _eval_norm(stage: nn.Sequential) -> None:
    stage[1].bn2.eval()


def _frozen_block(stage: nn.Sequential) -> None:
    stage[1].requires_grad_(False)


def _frozen_norms(stage: nn.Sequential) -> None:
    for block in stage:
        block.bn1.requires_grad_(False)
        block.bn2.requires_grad_(False)


def _frozen_first(stage: nn.Sequential) -> None:
    stage[0].requires_grad_(False)


CHANGES = {
    "a batch norm in evaluation mode": (_eval_norm, 1),
    "everything in evaluation mode": (lambda stage: stage.eval(), 0),
    "inner batch norms in evaluation mode": (lambda stage: [block.bn1.eval() for block in stage], 2),
    "a frozen block": (_frozen_block, 2),
    "frozen gammas and betas": (_frozen_norms, 2),
    "a frozen first block": (_frozen_first, 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_frozen_parts(change: str, handed: list[Tensor]) -> None:
    apply, count = CHANGES[change]
    fused, exact = twins()
    apply(fused), apply(exact)
    assert_same(fused, exact)
    assert len(handed) == count


def test_input_without_gradient(handed: list[Tensor]) -> None:
    fused, exact = twins()
    _frozen_first(fused), _frozen_first(exact)
    x, found = tensor(*X), []
    with backend("reference"):
        for stage in (fused, exact):
            stage(x).square().sum().backward()
            found.append([parameter.grad for parameter in stage.parameters()])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or relative_error(ours, theirs) <= 1e-10
    assert len(handed) == 1, "the first block has no backward pass"


HOOKS = {
    "forward": lambda block, hook: block.register_forward_hook(hook),
    "forward, before": lambda block, hook: block.register_forward_pre_hook(hook),
    "backward": lambda block, hook: block.register_full_backward_hook(hook),
    "backward, before": lambda block, hook: block.register_full_backward_pre_hook(hook),
    "of an inner module": lambda block, hook: block.conv2.register_forward_hook(hook),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_blocks_with_hooks_see_what_plain_ones_do(hook: str, handed: list[Tensor]) -> None:
    seen: list[list[Tensor]] = []
    stages = twins()
    for stage in stages:
        shown: list[Tensor] = []
        seen.append(shown)

        def look(module: nn.Module, *what: object, shown: list[Tensor] = shown) -> None:
            for part in what:
                tensors = part if isinstance(part, tuple) else (part,)
                shown.extend(t.detach().clone() for t in tensors if isinstance(t, Tensor))

        HOOKS[hook](stage[1], look)
    assert_same(*stages)
    assert seen[0]
    for ours, theirs in zip(*seen, strict=True):
        assert relative_error(ours, theirs) <= 1e-10
    assert not handed


def test_a_hook_for_every_module_stops_it(handed: list[Tensor]) -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert_same(*twins())
    finally:
        handle.remove()
    assert not handed


def test_a_bystander_does_not(handed: list[Tensor]) -> None:
    fused, exact = twins()
    seen: list[nn.Module] = []
    for block in fused:
        block.register_forward_hook(Bystander(lambda module, *_: seen.append(module)))
    assert_same(fused, exact)
    assert seen == list(fused)
    assert len(handed) == 2


def test_outputs_that_others_use_too_arrive_whole(handed: list[Tensor]) -> None:
    """Of chains that hand over, one whose output has a second consumer: the gradients were added up in between."""
    fused, exact = twins()
    x, found = tensor(*X), []
    for stage, keywords in ((fused, {"hands_over": True}), (exact, {})):
        for order in (1, -1):
            stage.zero_grad()
            a = x.clone().requires_grad_()
            with backend("reference"):
                z = stage[0](a, **keywords)
                parts = [stage[1](z).square().sum(), (3 * z).sum()]
                sum(parts[::order]).backward()
            found.append((a.grad, *(parameter.grad.clone() for parameter in stage[:2].parameters())))
    for ours, theirs in zip(found[:2], found[2:], strict=True):
        # Behind its ReLU or before it, the sum is masked once more.
        for mine, other in zip(ours, theirs, strict=True):
            assert relative_error(mine, other) <= 1e-10
    assert not handed


def test_an_output_written_to_is_not_taken(handed: list[Tensor]) -> None:
    fused, exact = twins()
    a, b = tensor(*X).requires_grad_(), tensor(*X).requires_grad_()
    with backend("reference"):
        fused[1](fused[0](a, hands_over=True).mul_(1.5)).square().sum().backward()
    exact[1](exact[0](b) * 1.5).square().sum().backward()
    assert relative_error(a.grad, b.grad) <= 1e-10
    assert not handed


def test_backward_passes_can_be_repeated_and_differentiated(handed: list[Tensor]) -> None:
    fused, exact = twins()
    x = tensor(*X).requires_grad_()
    with backend("reference"):
        loss = fused(x).square().sum()
        (first,) = torch.autograd.grad(loss, x, retain_graph=True)
        (second,) = torch.autograd.grad(loss, x, retain_graph=True)
        assert torch.equal(first, second)
        assert len(handed) == 4
        (third,) = torch.autograd.grad(loss, x, create_graph=True)
        assert relative_error(third, first) <= 1e-12
        assert len(handed) == 4, "gradients that are differentiated are whole"
        (ours,) = torch.autograd.grad(third.square().sum(), x)
    (plain,) = torch.autograd.grad(exact(x).square().sum(), x, create_graph=True)
    (theirs,) = torch.autograd.grad(plain.square().sum(), x)
    assert relative_error(ours, theirs) <= 1e-9


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool, handed: list[Tensor]) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, stage: nn.Module) -> None:
            super().__init__()
            self.stage = stage

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.stage, x, use_reentrant=reentrant)

    fused, exact = twins()
    assert_same(Checkpointed(fused), Checkpointed(exact))
    assert len(handed) == 2


def test_weights_written_to_before_the_backward_pass_are_an_error(handed: list[Tensor]) -> None:
    fused, _ = twins()
    with backend("reference"):
        z = fused(tensor(*X).requires_grad_())
        with torch.no_grad():
            fused[1].conv1.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.sum().backward()


def test_nothing_is_kept_beyond_what_each_block_keeps() -> None:
    """The same storages are saved as by the blocks alone, and none outlives the backward pass."""
    fused, _ = twins()

    def saved(stage: nn.Module) -> dict[int, Tensor]:
        held: dict[int, Tensor] = {}

        def pack(t: Tensor) -> Tensor:
            held[t.untyped_storage()._cdata] = t
            return t

        with backend("reference"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            run(stage, tensor(*X))
        return held

    alone = nn.Sequential(*(block for block in fused))
    sizes = [Counter((t.shape, t.dtype) for t in saved(stage).values()) for stage in (fused, alone)]
    assert sizes[0] == sizes[1]
    assert not handover.ends._entries
    assert not handover.reduced._entries


def test_containers_keep_their_type() -> None:
    """People look for layers by ``type(module) is nn.Sequential``."""
    model = fusedres.fuse(pytest.importorskip("torchvision").models.resnet50())

    def convolutions(module: nn.Module) -> int:
        if type(module) is nn.Sequential or module is model or isinstance(module, FusedBlock):
            return sum(convolutions(child) for child in module.children())
        return int(isinstance(module, nn.Conv2d))

    assert convolutions(model) == 53
    assert {type(getattr(model, f"layer{i}")) for i in range(1, 5)} == {nn.Sequential}
    own = cifar_resnet(20)
    assert {type(getattr(own, name)) for name in own.stages} == {nn.Sequential}


def test_networks_hand_over_from_block_to_block(handed: list[Tensor]) -> None:
    resnet = pytest.importorskip("torchvision").models.resnet
    torch.manual_seed(0)
    ours = cifar_resnet(20).double()
    for model, count in ((ours, 6), (resnet.ResNet(resnet.BasicBlock, [2, 2, 2, 2]).double(), 4)):
        handed.clear()
        fused = fusedres.fuse(randomised(model), schedule="prologue")
        exact = fusedres.unfuse(copy.deepcopy(fused))
        x = tensor(2, 3, 32, 32)
        with backend("reference"):
            assert_same_pass(run(fused, x), run(exact, x), tolerance=1e-8)
        assert len(handed) == count


def test_subclasses_with_a_forward_of_their_own_are_called_as_they_are() -> None:
    class Own(blocks.BasicBlock):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    stage = Walked(Own(4, 4), Own(4, 4), blocks.BasicBlock(4, 4), blocks.BasicBlock(4, 4)).double()
    fusedres.fuse(stage, schedule="prologue")
    x, z = tensor(*X), tensor(*X)
    for block in stage:
        z = block(z)
    with backend("reference"):
        assert relative_error(stage(x), z) <= 1e-12


def test_a_traced_stage_is_its_modules() -> None:
    fused, exact = twins()
    traced = torch.fx.symbolic_trace(nn.Sequential(*fused.eval()))
    x = tensor(*X)
    assert relative_error(traced(x), exact.eval()(x)) <= 1e-12
    assert any(node.op == "call_module" and node.target == "0.conv1" for node in traced.graph.nodes)


def test_blocks_alone_hand_nothing_over(handed: list[Tensor]) -> None:
    fused, _ = twins()
    with backend("reference"):
        z = tensor(*X).requires_grad_()
        for block in fused:
            assert isinstance(block, FusedBlock)
            z = block(z)
        z.sum().backward()
    assert not handed


@needs_vgpu
def test_on_kernels_in_bf16(handed: list[Tensor]) -> None:
    """A stage of a CIFAR network, as accurate as its plain modules in the same dtype.

    Every fourth ReLU is closed for good and the others hardly ever close: one that flips within rounding would be a
    larger error than all others.
    """
    torch.manual_seed(0)
    stage = Walked(plain.BasicBlock(16, 32, 2, shortcut="zero_pad"), *(plain.BasicBlock(32, 32) for _ in range(2)))
    for module in stage.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 6.0)
            module.bias.data[::4] = -30.0
    stage.to(torch.bfloat16).to(memory_format=torch.channels_last)
    fused, wide = fusedres.fuse(copy.deepcopy(stage), schedule="prologue"), copy.deepcopy(stage).double()
    x = torch.randn(2, 16, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last)
    with backend("vgpu:sm_90"), fusedres.record() as trace:
        ours = run(fused, x)
    launches = trace.by_kernel()
    assert len(handed) == 2
    assert launches["bn_backward_reduce_kernel"] == 1
    theirs, exact = run(stage, x), run(wide, x.double())
    for name, mine, other, truth in (
        ("z", ours.z, theirs.z, exact.z),
        ("dx", ours.dx, theirs.dx, exact.dx),
        *((name, ours.grads[name], theirs.grads[name], exact.grads[name]) for name in ours.grads),
    ):
        assert_as_accurate_as_eager(mine, other, truth, name=name)


def _resnet18() -> nn.Module:
    return pytest.importorskip("torchvision").models.resnet18()


@pytest.mark.parametrize(
    ("make", "side", "ends"),
    [(lambda: cifar_resnet(56, fused=False), 32, 3), (_resnet18, 224, 4)],
    ids=["cifar_resnet56", "resnet18"],
)
def test_one_reduction_is_left_to_a_stage(make: Callable[[], nn.Module], side: int, ends: int) -> None:
    """And that of a stem without pooling; counted as an H100 would run them."""
    with torch.device("meta"):
        model = make().bfloat16().to(memory_format=torch.channels_last)
        images = torch.empty(256, 3, side, side, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    fusedres.fuse(model, schedule="moments")
    with fusedres.record("sm_90") as trace, fusedres.backend("triton"):
        model(images).sum().backward()
    assert trace.by_kernel()["bn_backward_reduce_kernel"] == ends + (model.maxpool is None)
