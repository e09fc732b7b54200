"""timm's ResNets pass what they pass plain; what lies between layers is kept, and the rest is fused."""

import copy

import pytest
import torch
from torch import nn

import fusedres
from fusedres.patterns.choose import AUTO
from fusedres.plan.schedule import SCHEDULES
from tests.comparison import relative_error
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
    assert not reasons(fused) and all(norm.where is not None for norm in fusedres.report(fused).norms)
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


BETWEEN = {
    "squeeze-and-excite": ({"block_args": {"attn_layer": "se"}}, ["layer1.0.se"]),
    "efficient channel attention": ({"block_args": {"attn_layer": "eca"}}, ["layer1.0.se"]),
    "blur": ({"aa_layer": timm.layers.BlurPool2d}, ["layer2.0.aa"]),
    "another activation": ({"act_layer": nn.ELU}, ["layer1.0.act1"]),
    "a deep stem of another activation": ({"stem_type": "deep", "act_layer": nn.SiLU}, []),
    "drop path": ({"drop_path_rate": 0.5}, ["layer4.0.drop_path"]),
    "drop block": ({"drop_block_rate": 0.5}, ["layer4.0.drop_block"]),
}


@pytest.mark.parametrize(("changes", "kept"), BETWEEN.values(), ids=BETWEEN)
def test_what_lies_between_layers_is_kept_and_the_rest_fused(changes, kept):
    fused = fusedres.fuse(tiny(BOTTLENECK, **changes))
    report = fusedres.report(fused)
    assert not reasons(fused) and report.norms_fused == (len(report.norms), len(report.norms))
    plain = plain_copy(fused)
    calls: dict[str, int] = {}
    for model in (fused, plain):
        for name in kept:
            model.get_submodule(name).register_forward_hook(
                lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1})
            )
        torch.manual_seed(1)
        model.z = run(model, tensor(*IMAGES))
    assert calls == dict.fromkeys(kept, 2)
    assert_same_pass(fused.z, plain.z)


@pytest.mark.parametrize("rate", ["drop_path_rate", "drop_block_rate"])
def test_what_is_dropped_is_dropped_in_training_alone(rate):
    """In training what drops is called between passes; in evaluation nothing is left of it."""
    model = fusedres.fuse(tiny(BASIC, **{rate: 0.5}).eval())
    plain = plain_copy(model)
    assert not reasons(model)
    assert_twins(model, plain, tensor(*IMAGES))
    passes = []
    for each in (model.train(), plain.train()):
        torch.manual_seed(2)
        passes.append(run(each, tensor(*IMAGES)))
    assert not reasons(model)
    assert_same_pass(*passes)
    assert relative_error(passes[0].z, run(model.eval(), tensor(*IMAGES)).z) > 0.01


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
    report = fusedres.report(fusedres.fuse(ours))
    # The list of features asks whether what a layer gives is a list, which only a call can tell: its stem is left.
    assert (report.fused, len(report)) == (8, 9) and report.norms_fused == (19, 20)
    with torch.no_grad():
        torch.testing.assert_close(ours(tensor(*IMAGES).float()), theirs(tensor(*IMAGES).float()), rtol=1e-3, atol=1e-4)
