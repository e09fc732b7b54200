"""torchvision's RegNets: found by what their forward computes, with squeeze-and-excite or without."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fusedres
from fusedres.patterns.choose import AUTO
from fusedres.plan.schedule import SCHEDULES
from tests.comparison import relative_error
from tests.nn.twins import assert_twins, plain_copy, randomised, run, tensor

regnet = pytest.importorskip("torchvision.models.regnet")
IMAGES = (2, 3, 33, 40)


def tiny(se_ratio: float | None = None, **options) -> nn.Module:
    """Two stages: a block with and one without a projection each, convolutions in groups."""
    torch.manual_seed(0)
    params = regnet.BlockParams(
        depths=[2, 2], widths=[16, 24], group_widths=[8, 8], bottleneck_multipliers=[1.0, 1.0], strides=[2, 2],
        se_ratio=se_ratio,
    )  # fmt: skip
    return randomised(regnet.RegNet(params, num_classes=5, stem_width=8, **options)).double()


def reasons(model: nn.Module) -> dict[str, str]:
    return {row.name: row.reason for row in fusedres.report(model) if not row.fused}


@pytest.mark.parametrize("schedule", [AUTO, *SCHEDULES])
def test_passes_are_those_of_the_plain_model(schedule):
    fused = fusedres.fuse(tiny(), schedule=schedule)
    plain = plain_copy(fused)
    rows = [(row.name, row.kind, row.fused) for row in fusedres.report(fused)]
    blocks = [f"trunk_output.block{stage}.block{stage}-{i}" for stage in (1, 2) for i in (0, 1)]
    assert rows == [("stem", "SimpleStemIN", True), *((name, "ResBottleneckBlock", True) for name in blocks)]
    # Rounding grows from block to block.
    assert_twins(fused, plain, tensor(*IMAGES), tensor(*IMAGES, seed=2), tolerance=1e-8)
    assert_twins(fused.eval(), plain.eval(), tensor(*IMAGES), tolerance=1e-8)
    with torch.no_grad():
        torch.testing.assert_close(fused(tensor(*IMAGES)), plain(tensor(*IMAGES)))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_in_fp32_it_is_as_near_to_fp64_as_eager(training):
    exact = tiny().train(training)
    eager = copy.deepcopy(exact).float()
    fused = fusedres.fuse(copy.deepcopy(eager))
    truth, *passes = (run(m, tensor(*IMAGES).to(next(m.parameters()).dtype)) for m in (exact, eager, fused))
    eagers, ours = (relative_error(done.z.double(), truth.z) for done in passes)
    assert ours <= 1.5 * eagers + 1e-7
    eagers, ours = (relative_error(done.dx.double(), truth.dx) for done in passes)
    assert ours <= 1.5 * eagers + 1e-6


def test_blocks_with_squeeze_and_excite_are_fused_around_it():
    fused = fusedres.fuse(tiny(se_ratio=0.25))
    plain = plain_copy(fused)
    assert not reasons(fused) and fusedres.report(fused).norms_fused == (15, 15)
    calls = []
    for block in fused.trunk_output.block1:
        block.f.se.register_forward_hook(lambda module, *_: calls.append(module))
    assert_twins(fused, plain, tensor(*IMAGES), tolerance=1e-8)
    assert calls == [block.f.se for block in fused.trunk_output.block1]


def hook(name: str):
    return lambda block: block.get_submodule(name).register_forward_hook(lambda *_: None)


def replace(name: str, make):
    return lambda block: block.get_submodule(name.rpartition(".")[0]).__setattr__(name.rpartition(".")[2], make())


def wrap(name: str):
    def change(block):
        module = block.get_submodule(name)
        module.forward = lambda x, own=module.forward: own(x) * 0.5

    return change


NOT_YET = "not fused yet: call fusedres.fuse(model)"
WAITS = "has hooks, which a fused pass would not call"
EVERY = ("proj.1", "f.a.1", "f.b.1", "f.c.1")
IN_F = EVERY[1:]
CHANGES = {
    "hook on f": (hook("f"), {}, dict.fromkeys(IN_F, NOT_YET)),
    "hook on a layer": (hook("f.b"), {}, dict.fromkeys(IN_F, NOT_YET)),
    "hook in a layer": (hook("f.a.2"), dict.fromkeys(EVERY, f"2 {WAITS}"), None),
    "hook on the projection's batch norm": (hook("proj.1"), dict.fromkeys(EVERY, f"1 {WAITS}"), None),
    "another activation between": (replace("f.b.2", nn.CELU), {}, dict.fromkeys(IN_F, NOT_YET)),
    "another activation behind": (replace("activation", nn.CELU), {}, None),
    "no activation": (replace("f.a.2", nn.Identity), {}, None),
    "idle dropout": (lambda block: block.f.add_module("d", nn.Dropout(0.0)), {}, None),
    "a forward of its own": (
        wrap("f.a"), {"f.a.1": "forward was replaced"}, {"f.a.1": "forward was replaced", "proj.1": NOT_YET}
    ),
    "a layer removed": (replace("f.c", nn.Identity), {}, {"f.a.1": NOT_YET, "f.b.1": NOT_YET}),
}  # fmt: skip
"""What is changed, the batch norms of the block in no pass where that was before, with reasons, and after if these are
others."""


@pytest.mark.parametrize("after", [False, True], ids=["before fuse", "after fuse"])
@pytest.mark.parametrize(("change", "left", "left_after"), CHANGES.values(), ids=CHANGES)
def test_what_was_changed_is_fused_as_far_as_it_goes(change, left, left_after, after):
    fused = tiny()
    plain = copy.deepcopy(fused)
    if after:
        fusedres.fuse(fused)
        left = left if left_after is None else left_after
    for model in (fused, plain):
        change(model.trunk_output.block1[0])
    if not after:
        fusedres.fuse(fused)
    norms = {norm.name: norm for norm in fusedres.report(fused.trunk_output.block1[0]).norms}
    assert {name for name, norm in norms.items() if norm.where is None} == set(left)
    for name, reason in left.items():
        assert norms[name].reason.endswith(reason), norms[name].reason
    assert_twins(fused, plain, tensor(*IMAGES), tolerance=1e-8)


def test_only_classes_change_and_they_change_back():
    model = tiny()
    state, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    fused = fusedres.fuse(model)
    assert list(fused.state_dict()) == state and isinstance(fused.stem, regnet.SimpleStemIN)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert [type(module) for module in twin.modules()] == [type(module) for module in fused.modules()] != classes
        assert_twins(twin, plain_copy(twin), tensor(*IMAGES), tolerance=1e-8)
    assert [type(module) for module in fusedres.unfuse(fused).modules()] == classes


def test_every_block_of_a_whole_regnet_x():
    report = fusedres.report(fusedres.fuse(regnet.regnet_x_400mf()))
    assert report.fused == len(report) == 1 + sum([1, 2, 7, 12])
