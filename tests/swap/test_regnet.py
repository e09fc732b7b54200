"""fusedres.swap.families.regnet: RegNetX is fused whole, RegNetY's squeeze-and-excite is left alone with its reason."""

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


def test_blocks_with_squeeze_and_excite_are_left_alone_with_the_reason():
    fused = fusedres.fuse(tiny(se_ratio=0.25))
    plain = plain_copy(fused)
    assert len(reasons(fused)) == 4 and fusedres.report(fused)[0].fused
    assert set(reasons(fused).values()) == {"f.se is a SqueezeExcitation, and lies between what is fused"}
    assert_twins(fused, plain, tensor(*IMAGES), tolerance=1e-8)


def hook(name: str):
    return lambda block: block.get_submodule(name).register_forward_hook(lambda *_: None)


def replace(name: str, make):
    return lambda block: block.get_submodule(name.rpartition(".")[0]).__setattr__(name.rpartition(".")[2], make())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook("f"), "f has hooks"),
        (hook("f.b"), "f.b has hooks"),
        (hook("f.a.2"), "f.a.2 has hooks"),
        (hook("proj.1"), "proj.1 has hooks"),
        (replace("f.b.2", nn.GELU), "f.b.2 is a GELU, which no fused pass computes"),
        (replace("activation", nn.GELU), "activation is a GELU, which no fused pass computes"),
        (replace("f.a.2", nn.Identity), "f.b.2 is another activation than f.a.2"),
        (lambda block: block.f.add_module("d", nn.Dropout(0.0)), "expected f to hold a, b, c, found a, b, c, d"),
        (lambda block: setattr(block.f.a, "forward", lambda x: x), "f.a.forward was replaced"),
        (replace("f.c", nn.Identity), "f.c is a Identity, not a plain sequence"),
    ],
)
def test_what_was_changed_is_left_alone_with_the_reason(change, reason):
    fused = fusedres.fuse(tiny())
    block = fused.trunk_output.block1[0]
    change(block)
    (row,) = reasons(block).items()
    assert row[1].startswith(reason)


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
