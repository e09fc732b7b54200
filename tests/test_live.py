"""Fused passes read what the plain forward reads, as it is at that moment: tensors, parts and code of live modules."""

import copy
import types
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import fusedres
from fusedres.nn.fused import Fused, FusedPass
from fusedres.nn.structured import FusedStructure
from tests.comparison import relative_error
from tests.nn.twins import randomised, tensor

resnet = pytest.importorskip("torchvision").models.resnet

X = (3, 4, 7, 6)


def blocks(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """A fused network of two blocks in fp64, and its plain twin."""
    torch.manual_seed(seed)
    shortcut = nn.Sequential(nn.Conv2d(4, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
    plain = randomised(nn.Sequential(resnet.BasicBlock(4, 4), resnet.BasicBlock(4, 8, 2, shortcut))).double()
    return fusedres.fuse(copy.deepcopy(plain)), plain


def runs_fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of modules whose fused pass ran."""
    seen: list[str] = []
    attempt = Fused.attempt

    def noting(self, parts, run, *args):
        seen.append(type(self).__name__)
        return attempt(self, parts, run, *args)

    monkeypatch.setattr(Fused, "attempt", noting)
    return seen


def assert_equal(fused: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], *, grad: bool = False) -> None:
    for seed in range(2):
        x = tensor(*X, seed=seed)
        with torch.set_grad_enabled(grad):
            assert relative_error(fused(x.clone()), plain(x.clone())) <= 1e-9


def through_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.25).add_(0.01)


def vector(model: nn.Module) -> None:
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()) * 1.5, model.parameters())


def statistics_through_data(model: nn.Module) -> None:
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data.mul_(1.5)


def swapped(model: nn.Module) -> None:
    for parameter in model.parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach() * 0.5 + 0.1))


def cast_and_back(model: nn.Module) -> None:
    model.float().double()


def cast_by_swapping(model: nn.Module) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.float().double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


WRITES = [through_data, vector, statistics_through_data, swapped, cast_and_back, cast_by_swapping]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_write_between_two_evaluations_is_seen(write, mode, monkeypatch):
    fused, plain = (model.eval() for model in blocks())
    seen = runs_fused(monkeypatch)
    for _ in range(3):
        with mode():
            assert relative_error(fused(tensor(*X)), plain(tensor(*X))) <= 1e-9
        write(fused), write(plain)
    assert seen


def test_an_averaged_model_follows(monkeypatch):
    fused, plain = blocks()
    ours, theirs = (AveragedModel(model, multi_avg_fn=None, use_buffers=True).eval() for model in (fused, plain))
    seen = runs_fused(monkeypatch)
    for _ in range(3):
        assert_equal(ours, theirs)
        through_data(fused), through_data(plain)
        ours.update_parameters(fused), theirs.update_parameters(plain)
    # And back: copies of the averages into the model that is evaluated.
    for live, averaged in ((fused, ours), (plain, theirs)):
        for parameter, average in zip(live.parameters(), averaged.module.parameters(), strict=True):
            parameter.data.copy_(average.data)
    assert_equal(fused.eval(), plain.eval())
    assert seen


def test_no_parameter_is_referred_to_weakly():
    import weakref

    fused, _ = blocks()
    for training in (True, False):
        fused.train(training)
        for _ in range(3):
            z = fused(tensor(*X).requires_grad_(training))
            if training:
                z.backward(torch.randn(z.shape, dtype=z.dtype))  # not channels_last, of which the report tells
    del z
    fused.zero_grad()
    assert not any(weakref.getweakrefcount(parameter) for parameter in fused.parameters())


def as_replica(model: nn.Module) -> nn.Module:
    """As `nn.parallel.replicate` leaves a copy: plain tensors in the place of parameters and buffers."""
    made: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        replica = module._replicate_for_data_parallel()
        made[module] = replica
    for module, replica in made.items():
        for name, child in module._modules.items():
            setattr(replica, name, made[child]) if child is not None else None
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.view_as(parameter))
        for name, buffer in module._buffers.items():
            replica.__dict__.setdefault("_buffers", {})
            replica._buffers[name] = buffer
    return made[model]


@pytest.mark.parametrize("training", [True, False])
def test_replicas_of_data_parallel(training, monkeypatch):
    fused, plain = (model.train(training) for model in blocks())
    seen, grads = runs_fused(monkeypatch), []
    for model in (fused, plain):
        z = as_replica(model)(tensor(*X))
        z.square().sum().backward()
        grads.append([z.detach(), *(parameter.grad for parameter in model.parameters())])
    for ours, theirs in zip(*grads, strict=True):
        assert relative_error(ours, theirs) <= 1e-9
    assert seen


def test_computed_weights(monkeypatch):
    """Weight norm by hand, a merged low-rank update, a step of meta-learning: attributes that are no parameters."""
    fused, plain = blocks()
    seen, grads = runs_fused(monkeypatch), []
    for model in (fused, plain):
        torch.manual_seed(2)
        found = []
        for conv in [module for module in model.modules() if isinstance(module, nn.Conv2d)]:
            direction = conv.weight
            del conv.weight
            size = torch.rand(direction.shape[0], 1, 1, 1, dtype=torch.float64).requires_grad_()
            conv.weight = direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * size
            found += [direction, size]
        for norm in [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]:
            gamma = norm.weight
            del norm.weight
            norm.weight = gamma.square() + 0.5
            found.append(gamma)
        z = model(tensor(*X))
        grads.append([z.detach(), *torch.autograd.grad(z.square().sum(), found)])
    for ours, theirs in zip(*grads, strict=True):
        assert relative_error(ours, theirs) <= 1e-9
    assert len(seen) == 2
    assert all(row.fused for row in fusedres.report(fused))


def test_a_tensor_of_a_class_that_computes_in_its_own_way_is_left_to_it():
    class Quantised(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is F.conv2d:
                return 2 * super().__torch_function__(function, types, args, kwargs or {})
            return super().__torch_function__(function, types, args, kwargs or {})

    fused, plain = (model.eval().requires_grad_(False) for model in blocks())
    for model in (fused, plain):
        model[0].conv2.weight = nn.Parameter(model[0].conv2.weight.as_subclass(Quantised), requires_grad=False)
    assert type(fused[0].conv2.weight) is not nn.Parameter
    assert_equal(fused, plain)
    row = fusedres.report(fused)[0]
    assert not row.fused and "not a plain tensor" in row.reason


def doubled(function):
    def call(self, *args, **kwargs):
        return 2 * function(self, *args, **kwargs)

    return call


CLASSES = {
    "a block's forward": (resnet.BasicBlock, "forward"),
    "a ReLU's forward": (nn.ReLU, "forward"),
    "a batch norm's forward": (nn.BatchNorm2d, "forward"),
    "a convolution's forward": (nn.Conv2d, "forward"),
    "a convolution's inner forward": (nn.Conv2d, "_conv_forward"),
    "a convolution's call": (nn.Conv2d, "__call__"),
    "a block's call": (resnet.BasicBlock, "__call__"),
    "every module's call": (nn.Module, "_call_impl"),
}


@pytest.mark.parametrize(("cls", "name"), CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize("before", [True, False], ids=["before fuse", "after fuse"])
def test_patched_classes_are_not_skipped(cls, name, before, monkeypatch):
    fused, plain = (model.eval() for model in blocks())
    if before:
        fusedres.unfuse(fused)
    monkeypatch.setattr(cls, name, doubled(getattr(cls, name)))
    if before:
        fusedres.fuse(fused)
    x = tensor(*X)
    with torch.no_grad():
        assert torch.equal(fused(x), plain(x))
    for row in fusedres.report(fused):
        assert not row.fused and f"{name} was replaced" in row.reason
    monkeypatch.undo()
    assert all(row.fused for row in fusedres.report(fused))


@pytest.mark.parametrize("function", ["conv2d", "batch_norm", "relu"])
def test_patched_functions_are_not_skipped(function, monkeypatch):
    """As profilers patch them."""
    fused, plain = (model.eval() for model in blocks())
    original = getattr(F, function)
    monkeypatch.setattr(F, function, lambda *args, **kwargs: 2 * original(*args, **kwargs))
    assert_equal(fused, plain)
    assert f"functional.{function} was replaced" in fusedres.report(fused)[0].reason


def test_a_networks_inner_forward_is_not_skipped(monkeypatch):
    torch.manual_seed(0)
    plain = randomised(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)).double().eval()
    fused, x = fusedres.fuse(copy.deepcopy(plain)), tensor(2, 3, 32, 32)
    monkeypatch.setattr(resnet.ResNet, "_forward_impl", doubled(resnet.ResNet._forward_impl))
    with torch.no_grad():
        assert relative_error(fused(x), plain(x)) <= 1e-9
    assert "_forward_impl was replaced" in fusedres.report(fused)[0].reason


def circular(conv: nn.Conv2d) -> None:
    def forward(self, x, weight, bias):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), "circular"), weight, bias, self.stride)

    conv._conv_forward = types.MethodType(forward, conv)


def without_module(block: nn.Module) -> None:
    del block.relu
    block.relu = F.relu


INSTANCES = {
    "circular padding": (lambda block: circular(block.conv1), "conv1._conv_forward was replaced"),
    "a function for the ReLU": (without_module, "relu is a function, not a module"),
    "a forward of its own": (
        lambda block: setattr(block.bn2, "forward", lambda x: x * 2), "bn2.forward was replaced"
    ),
    "another class": (lambda block: setattr(block, "relu", nn.CELU()), "relu is a CELU"),
}  # fmt: skip


FUSED_OTHERWISE = [INSTANCES[name][0] for name in ("a function for the ReLU", "another class")]
"""What makes another block before `fuse`, which reads it as such."""


@pytest.mark.parametrize(("patch", "reason"), INSTANCES.values(), ids=INSTANCES)
@pytest.mark.parametrize("before", [True, False], ids=["before fuse", "after fuse"])
def test_patched_parts_are_not_skipped(patch, reason, before):
    fused, plain = (model.eval() for model in blocks())
    if before:
        fusedres.unfuse(fused)
    for model in (fused, plain):
        patch(model[0])
    if before:
        fusedres.fuse(fused)
    assert_equal(fused, plain)
    first, second = fusedres.report(fused)
    if before and patch in FUSED_OTHERWISE:
        assert first.fused and isinstance(fused[0], FusedStructure)
    else:
        assert not first.fused and reason in first.reason
    assert second.fused
    assert type(fusedres.unfuse(fused)[0]) is resnet.BasicBlock


def test_a_missing_part_fails_as_the_plain_block_does():
    fused, plain = (model.eval() for model in blocks())
    for model in (fused, plain):
        del model[0].bn2
    assert "bn2 is missing" in fusedres.report(fused)[0].reason
    for model in (fused, plain):
        with pytest.raises(AttributeError, match="has no attribute 'bn2'"):
            model(tensor(*X))


def test_what_was_decided_at_fuse_is_decided_again(monkeypatch):
    """A pooling that becomes an Identity, hooks that are removed, batch norms that become SyncBatchNorm."""
    torch.manual_seed(0)
    plain = randomised(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)).double().eval()
    hook = plain.layer1[0].conv1.register_forward_hook(lambda *_: None)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    fusedres.fuse(model)
    assert [row.fused for row in fusedres.report(model)] == [True, False, True, True, True]

    fused = fusedres.fuse(copy.deepcopy(plain))
    assert [row.fused for row in fusedres.report(fused)] == [True, False, True, True, True]
    for one in (fused, plain):
        next(iter(one.layer1[0].conv1._forward_hooks))
        one.layer1[0].conv1._forward_hooks.clear()
        one.maxpool = nn.Identity()
    hook.remove()
    assert all(row.fused for row in fusedres.report(fused))
    seen = runs_fused(monkeypatch)
    x = tensor(2, 3, 16, 16)
    with torch.no_grad():
        assert relative_error(fused(x), plain(x)) <= 1e-9
    assert len(seen) == 5


def test_timms_drop_path_decides_at_every_call():
    timm = pytest.importorskip("timm")
    plain = randomised(timm.create_model("resnet10t", drop_path_rate=0.5)).double()
    fused, x = fusedres.fuse(copy.deepcopy(plain)), tensor(4, 3, 32, 32)
    for training in (True, False, True):
        results = []
        for model in (plain.train(training), fused.train(training)):
            torch.manual_seed(5)
            results.append(model(x))
        assert relative_error(*results) <= 1e-9
        assert fusedres.report(fused).norms_fused == (14, 14)


class SameBlock(resnet.BasicBlock):
    """Built in another way, computed as its base is."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)
        self.extra = nn.Linear(2, 2)


class OtherBlock(resnet.BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Encoder(resnet.ResNet):
    """As segmentation libraries derive one: other outputs, the same stem and stages."""

    def __init__(self) -> None:
        super().__init__(resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)


def test_subclasses_that_compute_as_their_base_are_fused():
    torch.manual_seed(0)
    plain = randomised(nn.Sequential(SameBlock(4), OtherBlock(4, 4))).double().eval()
    fused = fusedres.fuse(copy.deepcopy(plain))
    assert [row.fused for row in fusedres.report(fused)] == [True, True]
    assert isinstance(fused[0], SameBlock) and isinstance(fused[0], FusedPass)
    # By what its own forward computes, not by what its base does.
    assert isinstance(fused[1], OtherBlock) and isinstance(fused[1], FusedStructure)
    assert type(copy.deepcopy(fused)[0]) is type(fused[0])
    assert_equal(fused, plain)
    assert [type(block) for block in fusedres.unfuse(fused)] == [SameBlock, OtherBlock]

    encoder = randomised(Encoder()).double().eval()
    fused = fusedres.fuse(copy.deepcopy(encoder))
    assert all(row.fused for row in fusedres.report(fused))
    x = tensor(2, 3, 32, 32)
    with torch.no_grad():
        assert relative_error(fused(x), encoder(x)) <= 1e-9
    assert type(fusedres.unfuse(fused)) is Encoder


def test_report_says_what_a_compiled_model_does():
    fused, _ = blocks()
    compiled = torch.compile(fused, backend="eager")
    assert all(row.fused for row in fusedres.report(compiled))
    fused[0].compile(backend="eager")
    assert all(row.fused for row in fusedres.report(fused))
    fused[1].conv1.compile(backend="eager")
    assert {row.name: row.reason for row in fusedres.report(fused) if not row.fused} == {
        "1": "conv1 was compiled on its own"
    }


def test_report_changes_nothing_to_answer(monkeypatch):
    _, plain = blocks()
    changed, live = [], list(plain.modules())

    def noted(self, *what):
        if any(self is module for module in live):
            changed.append(what)
        nn.Module.__setattr__(self, *what)

    monkeypatch.setattr(resnet.BasicBlock, "__setattr__", noted)
    assert {row.reason for row in fusedres.report(plain)} == {"not fused yet: call fusedres.fuse(model)"}
    assert not changed


@pytest.mark.parametrize("name", ["res2net50_26w_4s", "skresnet18", "resnest14d"])
def test_blocks_with_something_between_are_fused_around_it(name):
    timm = pytest.importorskip("timm")
    fused, counted = fusedres.report(fusedres.fuse(timm.create_model(name))).norms_fused
    assert fused == counted > 20


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_and_exported_with_its_passes_and_traced_as_the_plain_network(autocast):
    """Whole graphs, of any batch, after calls that were fused."""
    torch.manual_seed(0)
    plain = randomised(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)).eval()
    fused = fusedres.fuse(copy.deepcopy(plain))
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for batch in (2, 3):
            x = torch.randn(batch, 3, 32, 32)
            assert torch.equal(compiled(x), fused(x))
        exported = torch.export.export(fused, (x,)).module()
        assert torch.equal(exported(x), fused(x))
        with warnings.catch_warnings():
            warnings.simplefilter("error", torch.jit.TracerWarning)
            if autocast:  # whose casts `torch.jit.trace` takes for constants
                return
            assert torch.equal(torch.jit.trace(fused, x)(x), plain(x))
