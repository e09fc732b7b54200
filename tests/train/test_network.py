"""fusedres.train.network: networks by name for the data at hand."""

import pytest
import torch

pytest.importorskip("torchvision")

from torchvision.models.resnet import Bottleneck

from fusedres.models import names
from fusedres.nn import BasicBlock, plain
from fusedres.nn.fused import Fused
from fusedres.train.network import build, drops_blocks, known_options, layers


def test_a_network_of_the_library_and_its_twin():
    fused, twin = (build("cifar_resnet20", classes=7, channels=1, fused=fused) for fused in (True, False))
    assert fused.channels == twin.channels == 1
    assert any(type(module) is BasicBlock for module in fused.model.modules())
    assert any(type(module) is plain.BasicBlock for module in twin.model.modules())
    assert not any(isinstance(module, Fused) for module in twin.model.modules())
    assert fused.model(torch.rand(2, 1, 8, 8)).shape == (2, 7)
    assert layers(fused.model) == 20


def test_a_network_of_torchvision_is_fused_and_asks_for_colours():
    name = "resnext50_32x4d"
    assert name not in names()
    fused = build(name, classes=5, channels=1, schedule="moments")
    twin = build(name, classes=5, channels=1, fused=False)
    assert fused.channels == twin.channels == 3
    assert fused.model.state_dict().keys() == twin.model.state_dict().keys()
    blocks = [module for module in fused.model.modules() if isinstance(module, Bottleneck)]
    assert len(blocks) == 16
    assert all(isinstance(block, Fused) and block.fused_schedule == "moments" for block in blocks)
    assert not any(isinstance(module, Fused) for module in twin.model.modules())
    assert fused.model(torch.rand(2, 3, 32, 32)).shape == (2, 5)


def test_a_network_of_the_papers_that_a_library_has_is_that_of_the_library():
    fused, twin = (build("regnet_y_400mf", classes=5, channels=1, fused=fused) for fused in (True, False))
    assert "regnet_y_400mf" in names() and fused.channels == twin.channels == 3
    assert type(twin.model).__module__ == "torchvision.models.regnet" and isinstance(fused.model, type(twin.model))
    assert any(isinstance(module, Fused) for module in fused.model.modules())
    assert fused.model.fc.out_features == twin.model.fc.out_features == 5


FILE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=5):
        super().__init__()
        self.conv = nn.Conv2d(3, num_classes, 1)

    def forward(self, x):
        if x.sum() > 1e6:
            raise OverflowError
        return [self.conv(x).mean((2, 3))]

def fixed():
    return Net(4)

def picture():
    return nn.Conv2d(3, 4, 1)

def grey():
    return nn.Conv2d(1, 4, 1)
"""


def test_what_a_file_makes_has_as_many_classes_as_the_data_or_is_refused(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    for name, classes in (("Net", 7), ("fixed", 4)):
        found = build(f"{file}:{name}", classes=classes, channels=1, fused=False)
        assert found.channels == 3 and found.model.training
        assert found.model.conv.out_channels == classes and found.model.conv.weight.device.type == "cpu"
    for name, message in (
        ("fixed", r"expected one that gives each image 7 logits, got \(4,\) from .*:fixed"),
        ("picture", r"expected one that gives each image 7 logits, got \(4, 224, 224\) from .*:picture"),
        ("grey", r"expected one that takes a tensor of images, and the forward of .*:grey fails: RuntimeError: "),
    ):
        with pytest.raises(ValueError, match=f"^model: {message}"):
            build(f"{file}:{name}", classes=7, channels=3, fused=False)


def test_options_reach_the_network():
    options = known_options(["shortcut=projection", "in_channels=2"])
    assert options == {"shortcut": "projection", "in_channels": 2}
    model = build("cifar_resnet20", classes=3, channels=3, options=options).model
    assert model.conv1.in_channels == 2
    assert layers(model) == 22
    assert known_options(["a=0.5", "b=True", "c=(1, 2)", "d=x=y"]) == {"a": 0.5, "b": True, "c": (1, 2), "d": "x=y"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "cifar_resnet21",
            {},
            "model: expected a name such as .*cifar_resnet20.*, got 'cifar_.*21'",
        ),
        ("resnet51", {}, "model: expected a name such as .*resnet50.*, got 'resnet51'"),
        ("cifar_resnet20", {"depth_": 3}, "option: expected some of .*shortcut.* for cifar_resnet20, got depth_"),
        ("cifar_resnet20", {"num_classes": 3}, "option: expected some of .*, got num_classes"),
        ("cifar_resnet20", {"shortcut": "none"}, "shortcut"),
        ("vgg11", {"color": 1}, "option: vgg11: "),
        ("vgg16", {"color": 1}, "option: vgg16: "),
    ],
)
def test_unknown_names_and_options_are_refused(name, options, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build(name, classes=10, channels=3, options=options)


@pytest.mark.parametrize("pair", ["shortcut", "=3", "a b=3"])
def test_an_option_is_a_name_and_a_value(pair):
    with pytest.raises(ValueError, match="option: expected NAME=VALUE, got"):
        known_options([pair])


@pytest.mark.parametrize("fused", [False, True])
def test_stochastic_depth_is_known_by_its_block(fused):
    assert drops_blocks(build("stochastic_resnet110", classes=3, channels=3, fused=fused).model)
    assert not drops_blocks(build("cifar_resnet20", classes=3, channels=3, fused=fused).model)
