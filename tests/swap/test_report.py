"""fusedres.swap.report: every candidate has a row, and a row that is not fused says why."""

import copy
import re
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import fusedres
from tests.nn.twins import assert_same_pass, assert_twins, plain_copy, randomised, run, tensor
from tests.swap.changes import (
    FUSED_OTHERWISE,
    LEFT_ALONE,
    NamedConv,
    attribute,
    forward_of,
    hooked,
    replaced,
    subclassed,
)

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


def cases(*tables: dict[str, tuple[Any, ...]]) -> Any:
    """The change and the reason of each case."""
    every = {name: case[:2] for table in tables for name, case in table.items()}
    return pytest.mark.parametrize(("change", "reason"), every.values(), ids=every)


@cases(LEFT_ALONE)
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
        assert (row.fused, row.schedule, row.kind, row.norms) == (False, None, "Bottleneck", 0)
        assert re.search(reason, row.reason), row.reason
        if before:
            fusedres.fuse(resnet)
    assert isinstance(block, kind)
    assert [name for name, row in rows(resnet).items() if not row.fused] == [BLOCK]
    assert_same_but_for_momentum(resnet, plain, reason)
    assert type(fusedres.unfuse(resnet).get_submodule(BLOCK)) is kind


@pytest.mark.parametrize(("change", "left"), [case[::2] for case in FUSED_OTHERWISE.values()], ids=FUSED_OTHERWISE)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_fused_by_what_is_computed(resnet, change, left):
    """A block that its class does not tell of any more: what passes take of it is fused, the rest runs as it is."""
    plain = copy.deepcopy(randomised(resnet))
    for model in (resnet, plain):
        torch.manual_seed(0)
        change(model.get_submodule(BLOCK))
    kind = type(resnet.get_submodule(BLOCK))
    assert rows(resnet)[BLOCK].reason == "not fused yet: call fusedres.fuse(model)"
    report = fusedres.report(fusedres.fuse(resnet))
    assert all(row.fused for row in report)
    inside = [norm for norm in report.norms if norm.name.startswith(f"{BLOCK}.")]
    assert {norm.name for norm in inside if norm.where is None} == {f"{BLOCK}.{name}" for name in left}
    for norm in inside:
        name = norm.name.removeprefix(f"{BLOCK}.")
        assert norm.where is not None or left[name] in norm.reason
    assert sum(row.norms for row in report if row.name.startswith(BLOCK)) == len(inside) - len(left)
    assert_same_but_for_momentum(resnet, plain, str(left))
    assert type(fusedres.unfuse(resnet).get_submodule(BLOCK)) is kind


@pytest.mark.parametrize("after", [False, True], ids=["before fuse", "after fuse"])
def test_a_class_that_changes_nothing_is_as_good_as_its_base(resnet, after):
    replace = replaced("conv2", lambda c: NamedConv(c.in_channels, c.out_channels, 3, 2, 1))
    plain = copy.deepcopy(randomised(resnet))
    fusedres.fuse(resnet) if after else None
    for model in (resnet, plain):
        torch.manual_seed(0)
        replace(model.get_submodule(BLOCK))
    fusedres.fuse(resnet) if not after else None
    assert rows(resnet)[BLOCK].fused and fusedres.report(resnet).norms_fused == (9, 9)
    assert_twins(resnet, plain, tensor(*IMAGES), tolerance=1e-7)


def assert_same_but_for_momentum(actual: nn.Module, expected: nn.Module, reason: str) -> None:
    """A momentum that is no number spoils the running statistics, in eager too; NaN equals nothing."""
    passes = [run(model, tensor(*IMAGES)) for model in (actual, expected)]
    if "momentum" in reason:
        passes = [done._replace(buffers={}) for done in passes]
    assert_same_pass(*passes, 1e-7)


@cases(LEFT_ALONE, FUSED_OTHERWISE)
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
    "pooling that rounds up": (attribute("maxpool", "ceil_mode", True), "maxpool .*rounds up"),
    "dilated pooling": (attribute("maxpool", "dilation", 2), "maxpool is dilated"),
    "hook on the pooling": (hooked("register_forward_hook", "maxpool"), "maxpool has hooks"),
    "hook on the first convolution": (hooked("register_forward_hook", "conv1"), "conv1 has hooks"),
    "forward of the model replaced": (forward_of(""), "forward was replaced"),
}  # fmt: skip
FUSED_STEMS = {
    "average pooling": (replaced("maxpool", lambda _: nn.AvgPool2d(2)), "maxpool is a AvgPool2d"),
    "another activation": (replaced("relu", lambda _: nn.SiLU()), "relu is a SiLU, not a plain ReLU"),
    "deep stem": (
        replaced("conv1", lambda c: nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 64, 3, 1, 1))),
        "conv1 is a Sequential",
    ),
}  # fmt: skip


@cases(STEMS, FUSED_STEMS)
@pytest.mark.parametrize("after", [False, True], ids=["before fuse", "after fuse"])
def test_a_changed_stem(resnet, change, reason, after):
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
    if not after and any(change is case[0] for case in FUSED_STEMS.values()):
        assert (report[""].fused, report[""].kind, report[""].norms) == (True, "ResNet", 1)
    elif not (after and reason == "forward was replaced"):
        assert not report[""].fused and re.search(reason, report[""].reason), report[""].reason
    assert all(row.fused for name, row in report.items() if name)
    assert_twins(resnet, plain, tensor(*IMAGES), tolerance=1e-7)


class UsersResNet(resnet_module.ResNet):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_model_of_ones_own_gets_a_fused_stem_and_fused_blocks(resnet):
    resnet.__class__ = UsersResNet
    plain = copy.deepcopy(resnet)
    report = fusedres.report(fusedres.fuse(resnet))
    assert isinstance(resnet, UsersResNet)
    assert report[0].kind == "UsersResNet" and all(row.fused for row in report)
    assert report.norms_fused == (9, 9)
    assert_twins(resnet, plain, tensor(*IMAGES), tolerance=1e-8)
    assert type(fusedres.unfuse(resnet)) is UsersResNet


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
    assert all(row.fused and not row.reason for row in fusedres.report(fused))
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
