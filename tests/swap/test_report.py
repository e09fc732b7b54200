"""fusedres.swap.report: every candidate has a row, and a row that is not fused says why."""

import copy
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import fusedres
from tests.nn.twins import assert_same_pass, assert_twins, plain_copy, randomised, run, tensor

resnet_module = pytest.importorskip("torchvision").models.resnet

IMAGES = (4, 3, 32, 32)
BLOCK = "layer2.0"
"""A bottleneck with a projection; every model below has one there."""


def rows(model: nn.Module) -> dict[str, Any]:
    return {row.name: row for row in fusedres.report(model)}


def test_rows_before_fuse_after_fuse_and_after_unfuse(resnet):
    names = ["", "layer1.0", "layer2.0"]
    kinds = ["ResNet stem"] + ["Bottleneck"] * 2
    before = fusedres.report(resnet)
    assert [row.name for row in before] == names
    assert [row.kind for row in before] == kinds
    for row in before:
        assert (row.fused, row.schedule) == (False, None)
        assert "not fused yet" in row.reason and "fusedres.fuse" in row.reason
    assert type(resnet) is resnet_module.ResNet, "report changed a class"

    after = fusedres.report(fusedres.fuse(resnet, schedule="stats"))
    assert [(row.name, row.kind) for row in after] == list(zip(names, kinds, strict=True))
    assert {(row.fused, row.schedule, row.reason) for row in after} == {(True, "stats", "")}
    assert tuple(fusedres.report(fusedres.unfuse(resnet))) == tuple(before)


def test_own_blocks_are_named_by_their_plain_class():
    model = nn.Sequential(fusedres.nn.BasicBlock(4, 4), fusedres.nn.plain.ConvBNAct(4, 4))
    assert [(row.kind, row.fused) for row in fusedres.report(model)] == [
        ("BasicBlock", True),
        ("ConvBNAct", False),
    ]


def test_a_report_is_a_sequence_of_rows(resnet):
    report = fusedres.report(resnet)
    assert isinstance(report, Sequence) and len(report) == 3
    assert report[0].name == "" and report[-1].name == "layer2.0"
    assert [row.name for row in report[1:3]] == ["layer1.0", "layer2.0"]
    assert list(report) == [report[i] for i in range(3)]
    with pytest.raises(AttributeError):
        report[0].fused = True


def test_printed_as_a_table(resnet):
    resnet.layer2[0].relu = nn.GELU()
    lines = str(fusedres.report(fusedres.fuse(resnet, schedule="moments"))).splitlines()
    assert [line.split()[:5] for line in lines[:3]] == [
        ["name", "kind", "fused", "schedule", "reason"],
        ["(model)", "ResNet", "stem", "yes", "moments"],
        ["layer1.0", "Bottleneck", "yes", "moments"],
    ]
    assert lines[3].startswith("layer2.0") and lines[3].endswith("relu is a GELU, which no fused pass computes")
    assert lines[-1] == "2 of 3 candidates fused"
    assert repr(fusedres.report(resnet)) == str(fusedres.report(resnet))
    columns = [line.index(word) for line, word in zip(lines[:4], ["fused", "yes", "yes", "no "], strict=True)]
    assert len(set(columns)) == 1, "columns are not aligned"
    assert not any(line != line.rstrip() for line in lines)


def test_what_auto_does_on_a_cpu_is_said_once(resnet):
    assert str(fusedres.report(fusedres.fuse(resnet))).splitlines()[-1] == (
        "3 of 3 candidates fused; on a CPU, auto leaves small inputs and evaluation to the plain modules"
    )


def test_as_data_and_as_html(resnet):
    resnet.layer2[0].relu = nn.GELU()
    report = fusedres.report(fusedres.fuse(resnet, schedule="stats"))
    data = json.loads(json.dumps(report.to_dict()))
    assert (data["fused"], data["candidates"], len(data["rows"])) == (2, 3, 3)
    assert data["rows"][2]["reason"] == report[2].reason and data["rows"][1]["schedule"] == "stats"
    page = report._repr_html_()
    assert page.count("<tr>") == 4 and "relu is a GELU" in page and "2 of 3 candidates fused" in page


def test_an_empty_report_can_be_printed():
    assert str(fusedres.report(nn.Linear(1, 1))).splitlines()[-1] == "0 of 0 candidates fused"


def hooked(register: str, *path: str) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        getattr(block.get_submodule(".".join(path)), register)(lambda *_: None)

    return change


def replaced(name: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        new = make(block.get_submodule(name)).double()
        setattr(block.get_submodule(parent), child, new)

    return change


def attribute(module: str, name: str, value: Any) -> Callable[[nn.Module], None]:
    return lambda block: setattr(block.get_submodule(module), name, value)


def forward_of(module: str) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        target = block.get_submodule(module)
        target.forward = lambda x, original=target.forward: original(x) * 0.5

    return change


def strided_by_maximum(block: nn.Module) -> None:
    conv, bn = block.downsample
    block.downsample = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(conv.in_channels, conv.out_channels, 1), bn).double()


class UsersBottleneck(resnet_module.Bottleneck):
    def forward(self, x):
        return super().forward(x) * 2


class UsersConv(nn.Conv2d):
    pass


def subclassed(block: nn.Module) -> None:
    block.__class__ = UsersBottleneck


def like(conv: nn.Conv2d, **keywords: Any) -> nn.Conv2d:
    kept = {"stride": conv.stride, "padding": conv.padding, "groups": conv.groups, "bias": False}
    return nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, **{**kept, **keywords})


def full_batch_norm(bn: nn.BatchNorm2d) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(bn)


LEFT_ALONE = {
    "forward hook on a convolution": (hooked("register_forward_hook", "conv1"), "conv1 has hooks"),
    "forward pre-hook on a batch norm": (hooked("register_forward_pre_hook", "bn2"), "bn2 has hooks"),
    "backward hook on the ReLU": (
        lambda b: (setattr(b.relu, "inplace", False), hooked("register_full_backward_hook", "relu")(b)),
        "relu has hooks",
    ),
    "backward pre-hook on a convolution": (
        hooked("register_full_backward_pre_hook", "conv3"), "conv3 has hooks"
    ),
    "forward hook on the shortcut": (hooked("register_forward_hook", "downsample"), "downsample has hooks"),
    "forward hook inside the shortcut": (
        hooked("register_forward_hook", "downsample", "0"), "downsample.0 has hooks"
    ),
    "backward hook inside the shortcut": (
        hooked("register_full_backward_hook", "downsample", "1"), "downsample.1 has hooks"
    ),
    "weight norm": (lambda b: parametrizations.weight_norm(b.conv2), "conv2 is a ParametrizedConv2d"),
    "orthogonal weight": (lambda b: parametrizations.orthogonal(b.conv1), "conv1 is a ParametrizedConv2d"),
    "parametrized batch norm": (
        lambda b: nn.utils.parametrize.register_parametrization(b.bn1, "weight", nn.Softplus()),
        "bn1 is a ParametrizedBatchNorm2d",
    ),
    "weight norm by hook": (lambda b: weight_norm(b.conv2), "conv2 has hooks"),
    "spectral norm by hook": (lambda b: spectral_norm(b.conv3), "conv3 has hooks"),
    "pruning": (lambda b: prune.l1_unstructured(b.conv1, "weight", 0.5), "conv1 has hooks"),
    "synchronised batch norm": (replaced("bn2", full_batch_norm), "bn2 is a SyncBatchNorm"),
    "batch norm removed": (replaced("bn3", lambda _: nn.Identity()), "bn3 is an Identity"),
    "group norm": (replaced("bn1", lambda bn: nn.GroupNorm(2, bn.num_features)), "bn1 is a GroupNorm"),
    "instance norm": (
        replaced("bn1", lambda bn: nn.InstanceNorm2d(bn.num_features)), "bn1 is a InstanceNorm2d"
    ),
    "another activation": (replaced("relu", lambda _: nn.GELU()), "relu is a GELU"),
    "an activation with a parameter": (replaced("relu", lambda _: nn.PReLU()), "relu is a PReLU"),
    "reflected padding": (
        replaced("conv2", lambda c: like(c, padding_mode="reflect")), "conv2 pads with 'reflect'"
    ),
    "padding by name": (replaced("conv1", lambda c: like(c, padding="same")), "conv1 pads with .*'same'"),
    "a convolution of one's own": (
        replaced("conv2", lambda c: UsersConv(c.in_channels, c.out_channels, 3, 2, 1)), "conv2 is a UsersConv"
    ),
    "NaN momentum": (attribute("bn1", "momentum", float("nan")), "bn1.momentum is nan"),
    "infinite momentum": (
        attribute("downsample.1", "momentum", float("inf")), "downsample.1.momentum is inf"
    ),
    "pooled shortcut": (strided_by_maximum, "downsample is a Sequential"),
    "a convolution without batch norm as shortcut": (
        replaced("downsample", lambda d: d[0]), "downsample is a Conv2d"
    ),
    "forward of the block replaced": (forward_of(""), "forward was replaced"),
    "forward of a convolution replaced": (forward_of("conv2"), "conv2.forward was replaced"),
    "forward of a batch norm replaced": (forward_of("bn2"), "bn2.forward was replaced"),
    "forward of the ReLU replaced": (forward_of("relu"), "relu.forward was replaced"),
    "forward of the shortcut replaced": (forward_of("downsample"), "downsample.forward was replaced"),
    "a block of one's own": (subclassed, "UsersBottleneck derives from Bottleneck and has its own forward"),
}  # fmt: skip


left_alone = pytest.mark.parametrize(("change", "reason"), LEFT_ALONE.values(), ids=LEFT_ALONE)


@left_alone
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_left_alone_with_the_reason(resnet, change, reason):
    """The block runs its plain modules, its neighbours are fused, the model computes what it computed."""
    plain = copy.deepcopy(randomised(resnet))
    for model in (resnet, plain):
        torch.manual_seed(0)
        change(model.get_submodule(BLOCK))
    block = resnet.get_submodule(BLOCK)
    kind = type(block)
    for before in (True, False):
        row = rows(resnet)[BLOCK]
        assert (row.fused, row.schedule, row.kind) == (False, None, "Bottleneck")
        assert re.search(reason, row.reason), row.reason
        if before:
            fusedres.fuse(resnet)
    assert isinstance(block, kind)
    assert [name for name, row in rows(resnet).items() if not row.fused] == [BLOCK]
    assert_same_but_for_momentum(resnet, plain, reason)
    assert type(fusedres.unfuse(resnet).get_submodule(BLOCK)) is kind


def assert_same_but_for_momentum(actual: nn.Module, expected: nn.Module, reason: str) -> None:
    """A momentum that is no number spoils the running statistics, in eager too; NaN equals nothing."""
    passes = [run(model, tensor(*IMAGES)) for model in (actual, expected)]
    if "momentum" in reason:
        passes = [done._replace(buffers={}) for done in passes]
    assert_same_pass(*passes, 1e-7)


@left_alone
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_changed_after_fuse_takes_the_plain_pass(resnet, change, reason):
    """Whoever changes a live block gets what they would get of a plain one, and the report knows."""
    if change is subclassed:
        pytest.skip("a class given after fuse is the user's own")
    randomised(resnet)
    plain = copy.deepcopy(resnet)
    fusedres.fuse(resnet)
    for model in (resnet, plain):
        torch.manual_seed(0)
        change(model.get_submodule(BLOCK))
    row = rows(resnet)[BLOCK]
    if reason != "forward was replaced":  # what was put there may well call the fused one, as here
        assert not row.fused and row.schedule is None
        assert re.search(reason, row.reason), row.reason
    assert_same_but_for_momentum(resnet, plain, reason)
    # Unfusing afterwards, too, leaves what the user did.
    assert type(fusedres.unfuse(resnet).get_submodule(BLOCK)) is type(plain.get_submodule(BLOCK))


STEMS = {
    "average pooling": (replaced("maxpool", lambda _: nn.AvgPool2d(2)), "maxpool is a AvgPool2d"),
    "pooling that rounds up": (attribute("maxpool", "ceil_mode", True), "maxpool .*rounds up"),
    "dilated pooling": (attribute("maxpool", "dilation", 2), "maxpool is dilated"),
    "hook on the pooling": (hooked("register_forward_hook", "maxpool"), "maxpool has hooks"),
    "hook on the first convolution": (hooked("register_forward_hook", "conv1"), "conv1 has hooks"),
    "another activation": (replaced("relu", lambda _: nn.SiLU()), "relu is a SiLU, not a plain ReLU"),
    "deep stem": (
        replaced("conv1", lambda c: nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 64, 3, 1, 1))),
        "conv1 is a Sequential",
    ),
    "synchronised batch norm": (replaced("bn1", full_batch_norm), "bn1 is a SyncBatchNorm"),
    "forward of the model replaced": (forward_of(""), "forward was replaced"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), STEMS.values(), ids=STEMS)
@pytest.mark.parametrize("after", [False, True], ids=["before fuse", "after fuse"])
def test_a_stem_is_left_alone_with_the_reason(resnet, change, reason, after):
    randomised(resnet)
    plain = copy.deepcopy(resnet)
    if after:
        fusedres.fuse(resnet)
    for model in (resnet, plain):
        torch.manual_seed(0)
        change(model)
    if not after:
        fusedres.fuse(resnet)
    report = rows(resnet)
    if not (after and reason == "forward was replaced"):
        assert not report[""].fused and re.search(reason, report[""].reason), report[""].reason
    assert all(row.fused for name, row in report.items() if name)
    assert_twins(resnet, plain, tensor(*IMAGES), tolerance=1e-7)


class UsersResNet(resnet_module.ResNet):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_model_of_ones_own_keeps_its_stem_and_gets_fused_blocks(resnet):
    model = resnet
    model.__class__ = UsersResNet
    plain = copy.deepcopy(model)
    report = rows(fusedres.fuse(model))
    assert type(model) is UsersResNet
    assert "UsersResNet derives from ResNet" in report[""].reason
    assert all(row.fused for name, row in report.items() if name)
    assert_twins(model, plain, tensor(*IMAGES), tolerance=1e-8)


@pytest.mark.parametrize(
    "inner", ["conv1", "bn1", "conv2", "bn3", "relu", "downsample", "downsample.0", "downsample.1"]
)
def test_hooks_registered_after_fuse_fire(resnet, inner):
    """Hooks on a part of a fused block see what they see in a plain one, and can be removed."""
    resnet.get_submodule(BLOCK).relu.inplace = False  # torch refuses backward hooks before a write in place
    plain = copy.deepcopy(randomised(resnet))
    fusedres.fuse(resnet)
    seen: dict[str, list[torch.Tensor]] = {}
    handles = []
    for name, model in (("fused", resnet), ("plain", plain)):
        part = model.get_submodule(f"{BLOCK}.{inner}")
        notes = seen.setdefault(name, [])
        handles.append(part.register_forward_hook(lambda m, i, o, notes=notes: notes.append(o.detach().clone())))
        if inner != "bn3":  # torch refuses backward hooks before a sum in place
            handles.append(part.register_full_backward_hook(lambda m, i, o, notes=notes: notes.append(o[0].clone())))
    assert f"{inner} has hooks" in rows(resnet)[BLOCK].reason
    assert_twins(resnet, plain, tensor(*IMAGES), tolerance=1e-8)
    assert len(seen["fused"]) == len(seen["plain"]) > 0
    for ours, theirs in zip(seen["fused"], seen["plain"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    for handle in handles:
        handle.remove()
    assert rows(resnet)[BLOCK].fused
    count = len(seen["fused"])
    assert_twins(resnet, plain, tensor(*IMAGES), tolerance=1e-8)
    assert len(seen["fused"]) == count


def test_hooks_on_a_block_itself_fire_and_it_stays_fused(resnet):
    plain = copy.deepcopy(randomised(resnet))
    seen: dict[str, list[Any]] = {"fused": [], "plain": []}
    for name, model in (("fused", resnet), ("plain", plain)):
        for owner in (model.get_submodule(BLOCK), model):
            note = seen[name].append
            owner.register_forward_pre_hook(lambda m, i, note=note: note(("pre", i[0].detach().clone())))
            owner.register_forward_hook(lambda m, i, o, note=note: note(("post", o.detach().clone())))
            owner.register_full_backward_hook(lambda m, i, o, note=note: note(("back", o[0].clone())))
    fusedres.fuse(resnet)
    assert all(row.fused for row in fusedres.report(resnet))
    assert_twins(resnet, plain, tensor(*IMAGES), tolerance=1e-8)
    assert [kind for kind, _ in seen["fused"]] == [kind for kind, _ in seen["plain"]]
    assert len(seen["fused"]) == 6
    for (_, ours), (_, theirs) in zip(seen["fused"], seen["plain"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_a_forward_hook_on_a_block_can_replace_its_output(resnet):
    plain = copy.deepcopy(resnet)
    for model in (resnet, plain):
        model.get_submodule(BLOCK).register_forward_hook(lambda module, inputs, output: output * 0.5)
    assert_twins(fusedres.fuse(resnet), plain, tensor(*IMAGES), tolerance=1e-8)


def test_converted_to_synchronised_batch_norm_after_fuse(resnet):
    plain = plain_copy(randomised(resnet))
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fusedres.fuse(resnet))
    assert not any(row.fused for row in fusedres.report(fused))
    assert {row.reason.split(",")[0] for row in fusedres.report(fused)} == {"bn1 is a SyncBatchNorm"}
    assert_twins(fused, plain, tensor(*IMAGES), tolerance=1e-8)


def test_a_gradient_in_another_layout_is_copied_once_and_noted():
    model = fusedres.fuse(nn.Sequential(resnet_module.BasicBlock(8, 8)))
    x = torch.randn(2, 8, 6, 5).contiguous(memory_format=torch.channels_last)
    model(x).backward(torch.randn(2, 8, 6, 5).contiguous(memory_format=torch.channels_last))
    assert fusedres.report(model)[0].note == ""
    model(x).backward(torch.randn(2, 8, 6, 5))
    (row,) = fusedres.report(model)
    assert row.fused and "strides (240, 30, 5, 1)" in row.note
    assert "copied at every step" in str(fusedres.report(model))


def test_a_gpu_without_matrix_units_is_noted(small, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(sys.modules["fusedres.swap.report"], "why_not_on", lambda index: "it is old")
    rows = fusedres.report(fusedres.fuse(small))
    assert {row.note for row in rows if row.fused} == {"runs the plain modules: it is old"}
    rows = fusedres.report(fusedres.fuse(small, schedule="stats"))
    assert {row.note for row in rows if row.fused} == {"runs the library's calls: it is old"}
