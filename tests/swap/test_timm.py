"""fusedres.swap.families.timm: timm's ResNets pass what they pass plain; what lies between layers is left alone."""

import copy

import pytest
import torch
from torch import nn

import fusedres
from fusedres.patterns.choose import AUTO
from fusedres.plan.schedule import SCHEDULES
from tests.nn.twins import assert_same_pass, assert_twins, plain_copy, randomised, run, tensor

timm = pytest.importorskip("timm")
resnet = pytest.importorskip("timm.models.resnet")
IMAGES = (2, 3, 40, 33)

BASIC, BOTTLENECK = {"block": resnet.BasicBlock}, {"block": resnet.Bottleneck}
KINDS = {
    "resnet18": BASIC,
    "resnet50": BOTTLENECK,
    "resnext50": BOTTLENECK | {"cardinality": 4, "base_width": 8},
    "resnet50d": BOTTLENECK | {"stem_width": 8, "stem_type": "deep", "avg_down": True},
    "dilated": BOTTLENECK | {"output_stride": 8},
    "dilated, pooled": BASIC | {"output_stride": 16, "avg_down": True},
}


def tiny(kind: dict, **changes) -> nn.Module:
    torch.manual_seed(0)
    model = resnet.ResNet(layers=[1, 2, 1, 1], channels=[8, 12, 16, 20], num_classes=5, **{**kind, **changes})
    return randomised(model).double()


def reasons(model: nn.Module) -> dict[str, str]:
    return {row.name: row.reason for row in fusedres.report(model) if not row.fused}


@pytest.mark.parametrize("schedule", [AUTO, *SCHEDULES])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_passes_are_those_of_the_plain_model(kind, schedule):
    fused = fusedres.fuse(tiny(kind), schedule=schedule)
    same = {"layer4.0": "downsample is a Sequential, not a convolution and a batch norm"}
    assert reasons(fused) == (same if kind is KINDS["dilated, pooled"] else {})
    plain = plain_copy(fused)
    assert_twins(fused, plain, *[tensor(*IMAGES)] * 3)
    fused.eval(), plain.eval()
    assert_twins(fused, plain, tensor(*IMAGES))
    with torch.no_grad():
        torch.testing.assert_close(fused(tensor(*IMAGES)), plain(tensor(*IMAGES)))


def test_only_classes_change():
    model = timm.create_model("resnet18", num_classes=3)
    state, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    assert len(fusedres.report(fusedres.fuse(model))) == 9 and not reasons(model)
    assert list(model.state_dict()) == state and isinstance(model, resnet.ResNet)
    assert isinstance(copy.deepcopy(model).layer1[0], resnet.BasicBlock)
    fusedres.unfuse(model)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize(
    ("changes", "blocks", "reason"),
    [
        ({"block_args": {"attn_layer": "se"}}, 5, "se is a SEModule, and lies between what is fused"),
        ({"aa_layer": timm.layers.BlurPool2d}, 3, "aa is a BlurPool2d, and lies between what is fused"),
        ({"act_layer": nn.ELU}, 5, "act1 is a ELU, which no fused pass computes"),
        ({"stem_type": "deep", "act_layer": nn.SiLU}, 1, "conv1.2 is a SiLU, not a plain ReLU"),
        ({"drop_path_rate": 0.5}, 4, "drop_path is a DropPath, and lies between what is fused"),
    ],
)
def test_what_lies_between_layers_is_left_alone(changes, blocks, reason):
    fused = fusedres.fuse(tiny(BOTTLENECK, **changes))
    assert list(reasons(fused).values()).count(reason) == blocks
    plain = plain_copy(fused)
    for model in (fused, plain):
        torch.manual_seed(1)
        model.z = run(model, tensor(*IMAGES))
    assert_same_pass(fused.z, plain.z)


@pytest.mark.parametrize(
    ("rate", "dropping"),
    [
        ("drop_path_rate", ["layer2.0", "layer2.1", "layer3.0", "layer4.0"]),
        ("drop_block_rate", ["layer3.0", "layer4.0"]),
    ],
)
def test_what_is_dropped_is_dropped_in_training_alone(rate, dropping):
    model = fusedres.fuse(tiny(BASIC, **{rate: 0.5}).eval())
    assert not reasons(model)
    assert_twins(model, plain_copy(model), tensor(*IMAGES))
    assert list(reasons(model.train())) == dropping


def test_checkpointing_and_features():
    fused = fusedres.fuse(tiny(BOTTLENECK))
    plain = plain_copy(fused)
    for model in (fused, plain):
        model.set_grad_checkpointing()
    assert_twins(fused, plain, *[tensor(*IMAGES)] * 3)
    ours, theirs = (model.forward_intermediates(tensor(*IMAGES)) for model in (fused, plain))
    torch.testing.assert_close(ours, theirs)


def test_features_only():
    ours = timm.create_model("resnet18", features_only=True).eval()
    theirs = copy.deepcopy(ours)
    assert sum(row.fused for row in fusedres.report(fusedres.fuse(ours))) == 8
    with torch.no_grad():
        torch.testing.assert_close(ours(tensor(*IMAGES).float()), theirs(tensor(*IMAGES).float()), rtol=1e-3, atol=1e-4)
