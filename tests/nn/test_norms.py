"""fusedres.nn.norms: every kind of batch norm in the place of the plain one, and what is none."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusedres
from fusedres.models import cifar_resnet, densenet, preact_resnet
from fusedres.nn import plain
from fusedres.nn.norms import behind_norm, norm_of, why_not_norm
from tests.comparison import assert_as_accurate_as_eager, relative_error
from tests.nn.twins import assert_same_pass, assert_twins, plain_copy, randomised, run, tensor
from tests.vgpu_support import needs_vgpu

resnet = pytest.importorskip("torchvision").models.resnet
from torchvision.ops import FrozenBatchNorm2d  # noqa: E402

timm = pytest.importorskip("timm")
norm_act = timm.layers.norm_act


class BuiltOtherwise(nn.BatchNorm2d):
    """Computes as its base."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3, momentum=0.03)


class Frozen(nn.Module):
    """What the classes below have in common: four buffers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}.items():
            self.register_buffer(name, torch.full((channels,), value))

    def affine(self, x: Tensor, eps: float) -> Tensor:
        scale = self.weight * (self.running_var + eps).rsqrt()
        return x * scale.view(-1, 1, 1) + (self.bias - self.running_mean * scale).view(-1, 1, 1)


class TwoWaysFrozenBatchNorm2d(Frozen):
    """As Detectron2 has it: another way where nothing is differentiated, and the dtype stays."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels)
        self.num_features, self.eps = channels, eps

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            return self.affine(x, self.eps).to(x.dtype)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class ConstantFrozenBatchNorm2d(Frozen):
    """As DETR has it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x, 1e-5)


class BareFrozenBatchNorm2d(Frozen):
    """As Mask R-CNN had it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x, 0.0)


FROZEN = {
    "torchvision's frozen": FrozenBatchNorm2d,
    "torchvision's frozen, a larger eps": lambda channels: FrozenBatchNorm2d(channels, eps=0.1),
    "frozen in two ways": TwoWaysFrozenBatchNorm2d,
    "frozen with a constant eps": ConstantFrozenBatchNorm2d,
    "frozen without eps": BareFrozenBatchNorm2d,
    "timm's frozen": lambda channels: norm_act.FrozenBatchNormAct2d(channels, apply_act=False),
}
KINDS = {
    "built otherwise": BuiltOtherwise,
    "no running statistics": lambda channels: nn.BatchNorm2d(channels, track_running_stats=False),
    "timm's with no activation": lambda channels: norm_act.BatchNormAct2d(channels, apply_act=False),
    "synchronised, but alone": nn.SyncBatchNorm,
    "timm's synchronised, but alone": lambda channels: timm.layers.convert_sync_batchnorm(
        norm_act.BatchNormAct2d(channels, apply_act=False)
    ),
    **FROZEN,
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def layer(kind: str) -> nn.Module:
    module = plain.ConvBNAct(5, 6)
    module.bn = KINDS[kind](6)
    return module


def strided(norm_layer, block) -> nn.Module:
    out = 4 * block.expansion
    downsample = nn.Sequential(nn.Conv2d(5, out, 1, 2, bias=False), norm_layer(out))
    return block(5, 4, 2, downsample, norm_layer=norm_layer)


BLOCKS = {
    "a layer": layer,
    "a basic block": lambda kind: strided(KINDS[kind], resnet.BasicBlock),
    "a bottleneck": lambda kind: strided(KINDS[kind], resnet.Bottleneck),
    "an identity shortcut": lambda kind: resnet.BasicBlock(5, 5, norm_layer=KINDS[kind]),
}


def made(block: str, kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return randomised(BLOCKS[block](kind).to(dtype))


@each_kind
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("backend", "schedule"), [("native", "moments"), ("reference", "stats")])
def test_computes_what_the_plain_block_does(block, kind, schedule, backend):
    fused = fusedres.fuse(made(block, kind), schedule=schedule)
    plain, before = plain_copy(fused), copy.deepcopy(fused.state_dict())
    x = tensor(3, 5, 7, 6).to(memory_format=torch.channels_last)
    assert [row.reason for row in fusedres.report(fused)] == [""]
    with fusedres.backend(backend):
        for mode in (True, False):
            ours = run(fused.train(mode), x)
            assert_same_pass(ours, run(plain.train(mode), x))
            with torch.no_grad():
                torch.testing.assert_close(fused(x), plain(x), rtol=1e-10, atol=1e-10)
    assert not any("bn" in name for name in ours.grads) or kind not in FROZEN
    if kind in FROZEN:
        assert all(torch.equal(value, before[name]) for name, value in fused.state_dict().items())


@needs_vgpu
@pytest.mark.parametrize("schedule", ["block_end", "prologue", "moments"])
@pytest.mark.parametrize("kind", ["torchvision's frozen", "no running statistics"])
def test_on_kernels(kind, schedule, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    plain = strided(KINDS[kind], resnet.Bottleneck)
    fused, exact = fusedres.fuse(copy.deepcopy(plain), schedule=schedule), copy.deepcopy(plain).double()
    x = tensor(3, 5, 7, 6, dtype=torch.float32).to(memory_format=torch.channels_last)
    for mode in (True, False):
        with fusedres.backend("vgpu:sm_90"), fusedres.record() as trace:
            ours = run(fused.train(mode), x)
            with torch.no_grad():
                evaluated = fused(x)
        assert trace.launches
        theirs, right = run(plain.train(mode), x), run(exact.train(mode), x.double())
        assert_as_accurate_as_eager(ours.z, theirs.z, right.z)
        assert_as_accurate_as_eager(ours.dx, theirs.dx, right.dx)
        with torch.no_grad():
            assert_as_accurate_as_eager(evaluated, plain(x), exact(x.double()))


@pytest.mark.parametrize("depths", [(1, 1, 1, 1), pytest.param((3, 4, 6, 3), marks=pytest.mark.slow)], ids=sum)
def test_a_whole_network_of_frozen_norms(depths):
    torch.manual_seed(0)
    plain = resnet.ResNet(resnet.Bottleneck, depths, num_classes=5, norm_layer=FrozenBatchNorm2d).double()
    for module in plain.modules():
        if type(module) is resnet.Bottleneck:
            module.bn3.weight.fill_(0.3)
    fused = fusedres.fuse(copy.deepcopy(plain))
    assert [row.reason for row in fusedres.report(fused)] == [""] * (1 + sum(depths))
    for mode in (True, False):
        assert_twins(fused.train(mode), plain.train(mode), tensor(2, 3, 40, 32))
    assert list(fusedres.unfuse(fused).state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("kind", ["torchvision's frozen", "frozen in two ways", "no running statistics"])
def test_under_autocast_a_block_gives_its_dtype(kind):
    fused = fusedres.fuse(made("a basic block", kind, torch.float32), schedule="stats")
    plain, x = plain_copy(fused), tensor(3, 5, 7, 6, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = run(fused, x), run(plain, x)
    assert ours.z.dtype == torch.bfloat16
    assert theirs.z.dtype == (torch.float32 if kind == "torchvision's frozen" else torch.bfloat16)
    exact = run(plain.double(), x.double())
    for ours_, theirs_, right in ((ours.z, theirs.z, exact.z), (ours.dx, theirs.dx, exact.dx)):
        assert relative_error(ours_, right) <= 1.5 * max(relative_error(theirs_, right), 2**-8)


WITHOUT_STATISTICS = {
    "basic blocks and zero-pad": lambda: cifar_resnet(8),
    "pre-activation": lambda: preact_resnet(11),
    "dense": lambda: densenet(10, 4),
    "a stem": lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=5),
}


@pytest.mark.parametrize("name", WITHOUT_STATISTICS)
def test_every_pattern_without_running_statistics(name):
    torch.manual_seed(0)
    fused = WITHOUT_STATISTICS[name]().double()
    for module in fused.modules():
        if type(module) is nn.BatchNorm2d:
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    fused = fusedres.fuse(randomised(fused))
    plain, x = plain_copy(fused), tensor(2, 3, 24, 24)
    assert fusedres.report(fused).fused == len(fusedres.report(fused)) > 1
    with fusedres.backend("native"):
        for mode in (True, False):
            assert_same_pass(run(fused.train(mode), x), run(plain.train(mode), x), 1e-9)
            with torch.no_grad():
                torch.testing.assert_close(fused(x), plain(x), rtol=1e-9, atol=1e-9)


def test_statistics_that_are_no_longer_tracked_are_used_in_evaluation_alone():
    module = made("a bottleneck", "built otherwise")
    module.bn2.track_running_stats = False
    fused = fusedres.fuse(module, schedule="moments")
    plain = plain_copy(fused)
    for mode in (True, False):
        assert_twins(fused.train(mode), plain.train(mode), tensor(3, 5, 7, 6))
    assert fused.bn2.num_batches_tracked == 0 and fused.bn1.num_batches_tracked == 1


@pytest.mark.parametrize("kind", ["torchvision's frozen", "built otherwise"])
def test_numbers_are_read_at_every_call(kind):
    fused = fusedres.fuse(made("a basic block", kind), schedule="stats")
    plain, x = plain_copy(fused), tensor(3, 5, 7, 6)
    assert_twins(fused, plain, x)
    for module in (fused, plain):
        module.bn1.eps = 0.5
        module.bn2.weight.data.mul_(2)
    assert_twins(fused, plain, x)


class Shifted(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class Lenient(nn.BatchNorm2d):
    def _check_input_dim(self, x):
        pass


class Doubled(nn.BatchNorm2d):
    @property
    def eps(self):
        return 2e-5

    @eps.setter
    def eps(self, value):
        pass


class ShiftedFrozenBatchNorm2d(ConstantFrozenBatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class DeafFrozenBatchNorm2d(ConstantFrozenBatchNorm2d):
    """Its eps says nothing."""

    eps = 1e-5


class MovingFrozenBatchNorm2d(ConstantFrozenBatchNorm2d):
    def forward(self, x):
        z = super().forward(x)
        self.running_mean += 1
        return z


class MeasuringFrozenBatchNorm2d(ConstantFrozenBatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, None, None, training=True) if self.training else super().forward(x)


class DetachedFrozenBatchNorm2d(ConstantFrozenBatchNorm2d):
    def forward(self, x):
        return super().forward(x.detach()) + 0 * x


class TrainedFrozenBatchNorm2d(nn.BatchNorm2d):
    """A name is not enough."""

    def forward(self, x):
        return super().forward(x)


class UnfinishedFrozenBatchNorm2d(Frozen):
    def forward(self, x):
        raise NotImplementedError


OTHERS = {
    "its own forward": (Shifted, "bn is a Shifted, which has its own forward"),
    "its own check": (Lenient, "bn is a Lenient, which has its own _check_input_dim"),
    "a number that is computed": (Doubled, "bn is a Doubled, not a plain BatchNorm2d"),
    "another number of dimensions": (nn.BatchNorm3d, "bn is a BatchNorm3d, not a plain BatchNorm2d"),
    "no batch norm": (lambda channels: nn.GroupNorm(1, channels), "bn is a GroupNorm, not a plain BatchNorm2d"),
    **{
        cls.__name__: (cls, f"bn is a {cls.__name__}, not a plain BatchNorm2d")
        for cls in (
            ShiftedFrozenBatchNorm2d, DeafFrozenBatchNorm2d, MovingFrozenBatchNorm2d, MeasuringFrozenBatchNorm2d,
            DetachedFrozenBatchNorm2d, TrainedFrozenBatchNorm2d, UnfinishedFrozenBatchNorm2d,
        )
    },
}  # fmt: skip


@pytest.mark.parametrize(("make", "reason"), OTHERS.values(), ids=OTHERS)
def test_others_are_left_alone(make, reason):
    module = plain.ConvBNAct(5, 6)
    module.bn = make(6)
    before = copy.deepcopy(module.bn.state_dict())
    assert [row.reason for row in fusedres.report(fusedres.fuse(module))] == [reason]
    assert all(torch.equal(value, before[name]) for name, value in module.bn.state_dict().items())


def test_an_activation_of_the_norms_own_is_not_forgotten():
    norm = norm_act.BatchNormAct2d(6, act_layer=nn.SiLU)
    assert why_not_norm("bn", norm) is None
    assert [(name, type(child)) for name, child in behind_norm(norm)] == [("drop", nn.Identity), ("act", nn.SiLU)]
    module = plain.ConvBNAct(5, 6)
    module.bn = norm
    fused, x = fusedres.fuse(module.double()), tensor(3, 5, 7, 6)
    assert [(row.fused, row.reason) for row in fusedres.report(fused)] == [(True, "")]
    torch.testing.assert_close(fused(x), F.relu(norm.act(F.batch_norm(module.conv(x), None, None, training=True))))


def test_hooks_on_what_does_nothing_are_called():
    module = made("a layer", "timm's with no activation")
    module.bn.act.register_forward_hook(lambda *_: None)
    reason = "bn.act has hooks, which a fused pass would not call"
    assert [row.reason for row in fusedres.report(fusedres.fuse(module))] == [reason]


@pytest.mark.parametrize("cls", [FrozenBatchNorm2d, BuiltOtherwise, norm_act.BatchNormAct2d])
def test_code_that_is_replaced_later_is_run(cls, monkeypatch):
    kind = next(name for name, make in KINDS.items() if type(make(1)) is cls)
    fused, x = fusedres.fuse(made("a layer", kind)), tensor(3, 5, 7, 6)
    monkeypatch.setattr(cls, "forward", lambda self, x: -x.abs(), raising=False)
    assert [row.reason for row in fusedres.report(fused)] == [f"bn is a {cls.__name__}, which has its own forward"]
    assert torch.equal(fused(x), torch.zeros_like(fused(x)))


def test_a_norm_that_lost_a_buffer_runs_as_it_is():
    module = made("a layer", "frozen in two ways").eval()
    fused, x = fusedres.fuse(module), tensor(3, 5, 7, 6)
    fused.bn.bias = None
    expected = F.relu(F.batch_norm(fused.conv(x), fused.bn.running_mean, fused.bn.running_var, fused.bn.weight, None))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), expected)


def test_numbers_of_a_frozen_norm():
    norm = norm_of(FrozenBatchNorm2d(3, eps=0.1).train(), torch.ones(3))
    assert norm.numbers.eps == 0.1 and not norm.numbers.batch_stats and norm.counted is None
    assert norm_of(ConstantFrozenBatchNorm2d(3)).numbers.eps == 1e-5
    assert norm_of(BareFrozenBatchNorm2d(3)).numbers.eps == 0
