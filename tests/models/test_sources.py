"""fusedres.models.sources: a model is found by its name by one rule, for every command."""

import socket

import pytest
import torch
from torch import nn

from fusedres import models
from fusedres.models.sources import IMAGENET, IMAGES, TAKES, names, namesake, source
from fusedres.traffic.tensors import first_tensor

pytest.importorskip("torchvision")
pytest.importorskip("timm")

# Name, library, class of the model, size of its images, and what it takes.
NAMES = [
    ("resnet18", "fusedres", "fusedres.models.network.ResNet", IMAGENET, IMAGES),
    ("cifar_resnet20", "fusedres", "fusedres.models.network.ResNet", (3, 32, 32), IMAGES),
    ("vgg11_bn", "torchvision", "torchvision.models.vgg.VGG", IMAGENET, IMAGES),
    ("vgg16_bn", "torchvision", "torchvision.models.vgg.VGG", IMAGENET, IMAGES),
    ("resnest50", "timm", "timm.models.resnet.ResNet", IMAGENET, IMAGES),
    ("iresnet50", "fusedres", "fusedres.models.network.ResNet", IMAGENET, IMAGES),
    (
        "fasterrcnn_resnet50_fpn", "torchvision", "torchvision.models.detection.faster_rcnn.FasterRCNN", IMAGENET,
        TAKES["detection"],
    ),
    ("fcn_resnet50", "torchvision", "torchvision.models.segmentation.fcn.FCN", IMAGENET, IMAGES),
    ("torchvision.resnet18", "torchvision", "torchvision.models.resnet.ResNet", IMAGENET, IMAGES),
    (
        "torchvision.lraspp_mobilenet_v3_large", "torchvision", "torchvision.models.segmentation.lraspp.LRASPP",
        IMAGENET, IMAGES,
    ),
    (
        "torchvision.ssdlite320_mobilenet_v3_large", "torchvision", "torchvision.models.detection.ssd.SSD", IMAGENET,
        TAKES["detection"],
    ),
    ("torchvision.r3d_18", "torchvision", "torchvision.models.video.resnet.VideoResNet", IMAGENET, TAKES["video"]),
    (
        "torchvision.raft_small", "torchvision", "torchvision.models.optical_flow.raft.RAFT", IMAGENET,
        TAKES["optical_flow"],
    ),
    ("timm.resnet18", "timm", "timm.models.resnet.ResNet", (3, 224, 224), IMAGES),
    ("timm/resnet26t", "timm", "timm.models.resnet.ResNet", (3, 256, 256), IMAGES),
    ("resnet26t", "timm", "timm.models.resnet.ResNet", (3, 256, 256), IMAGES),
]  # fmt: skip
# Those of transformers: a classifier, a backbone where there is no classifier, a plain model where there is neither.
TRANSFORMERS = [
    ("hf.resnet", "resnet.modeling_resnet.ResNetForImageClassification", IMAGENET),
    ("hf.regnet", "regnet.modeling_regnet.RegNetForImageClassification", IMAGENET),
    ("hf.mobilevit", "mobilevit.modeling_mobilevit.MobileViTForImageClassification", (3, 256, 256)),
    ("hf.rt_detr_resnet", "rt_detr.modeling_rt_detr_resnet.RTDetrResNetBackbone", IMAGENET),
    ("hf.detr", "detr.modeling_detr.DetrModel", IMAGENET),
]


def path_of(cls):
    return f"{cls.__module__}.{cls.__qualname__}"


@pytest.mark.parametrize(("name", "library", "cls", "size", "takes"), NAMES, ids=[case[0] for case in NAMES])
def test_a_name_gives_the_librarys_model_and_what_it_is_given(name, library, cls, size, takes):
    found = source(name)
    assert (found.name, found.library, found.size, found.takes) == (name, library, size, takes)
    model = found.on_meta()
    assert path_of(type(model)) == cls and model.training
    assert all(parameter.is_meta for parameter in model.parameters())
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


@pytest.mark.parametrize(("name", "cls", "size"), TRANSFORMERS, ids=[case[0] for case in TRANSFORMERS])
def test_a_type_of_transformers_gives_what_it_has_with_its_default_configuration(name, cls, size):
    pytest.importorskip("transformers")
    found = source(name)
    assert (found.library, found.size, found.takes) == ("hf", size, IMAGES)
    assert path_of(type(found.on_meta())) == f"transformers.models.{cls}"


def test_nothing_is_downloaded(monkeypatch):
    def refused(*_, **__):
        raise AssertionError("a model asks for the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    asked = ("torchvision.fcn_resnet50", "torchvision.fasterrcnn_resnet50_fpn", "timm.resnet18", *names("hf"))
    built = {name: sum(1 for _ in source(name).on_meta().parameters()) for name in asked}
    assert min(built.values()) > 50, built


def test_options_reach_the_model_and_what_it_has_not_is_refused():
    assert source("resnet18").build(num_classes=7).fc.out_features == 7
    with torch.device("meta"):
        assert source("vgg11").build(num_classes=7).classifier[-1].out_features == 7
        assert source("timm.resnet18").build(num_classes=7).fc.out_features == 7
    pytest.importorskip("transformers")
    small = source("hf.resnet").build(num_classes=7, depths=[1, 1], hidden_sizes=[8, 16], embedding_size=8)
    assert first_tensor(small(torch.rand(2, 3, 32, 32))).shape == (2, 7)
    with pytest.raises(ValueError, match=r"model: hf\.resnet failed: TypeError: its configuration has no color$"):
        source("hf.resnet").made(color=3)


def test_every_library_is_enumerated_as_its_models_are_named():
    pytest.importorskip("transformers")
    found = {library: names(library) for library in ("fusedres", "torchvision", "timm", "hf")}
    assert found["fusedres"] == tuple(models.names())
    assert len(found["torchvision"]) > 100 and len(found["timm"]) > 1000 and len(found["hf"]) > 15
    assert {"torchvision.resnet50", "torchvision.fcn_resnet50", "torchvision.maskrcnn_resnet50_fpn",
            "torchvision.r2plus1d_18", "torchvision.raft_small", "timm.resnet50", "hf.resnet",
            "hf.regnet"} <= set().union(*found.values())  # fmt: skip
    with pytest.raises(ValueError, match="library: expected one of fusedres, torchvision, timm, hf, got 'keras'"):
        names("keras")
    assert not any("quantized" in name for name in found["torchvision"])
    found["fusedres"] = tuple(name for name in found["fusedres"] if models.entry(name).library_name is None)
    for library, some in found.items():
        assert all(source(name).library == library for name in some[:: max(1, len(some) // 5)])


def test_it_is_said_whose_a_model_is_where_two_libraries_have_it():
    assert namesake("resnet50") == "resnet50: fusedres's own; torchvision.resnet50 is torchvision's"
    assert [
        namesake(name) for name in ("torchvision.resnet50", "vgg11", "vgg16", "plain18", "cifar_resnet20", "nothing")
    ] == ([None] * 6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet55", r"such as .*resnet50.*, or path\.py:function, got 'resnet55'$"),
        ("regnet", r"such as .*\bhf\.regnet\b"),
        ("torchvision.fcn_resnet", r"such as .*torchvision\.fcn_resnet50.*, got 'torchvision\.fcn_resnet'$"),
        ("timm/resnet55", r"such as timm\.resnet5.*, got 'timm/resnet55'$"),
        ("hf.resnett", r"such as hf\.resnet, hf\.regnet, .*, got 'hf\.resnett'$"),
        ("xyzzy", r"such as resnet18, resnet34, .*, got 'xyzzy'$"),
        ("hf.", r"such as hf\."),
        (
            "torchvision.quantized_resnet50",
            r"computes in int8, .*; expected torchvision\.resnet50$",
        ),
        ("hf.upernet", r"hf\.upernet is no image classifier, backbone or plain model of transformers$"),
    ],
)
def test_what_no_library_has_is_refused_with_near_names(name, message):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=rf"^model: .*{message}"):
        source(name)


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(models.sources, "_installed", lambda library: library != "timm")
    with pytest.raises(ValueError, match=r"got 'resnet26t'; not installed: timm$"):
        source("resnet26t")
    assert names("timm") == ()
    monkeypatch.setitem(models.sources.PACKAGES, "hf", ("no_such_package", "hf"))
    with pytest.raises(ImportError, match=r"no_such_package not installed: pip install fusedres\[hf\]"):
        source("hf.resnet")


FILE = """
from __future__ import annotations
from dataclasses import dataclass
from torch import nn
from torchvision.models import resnet18

@dataclass
class Options:
    width: int = 8

class Net(nn.Sequential):
    def __init__(self, num_classes=3):
        super().__init__(nn.Conv2d(3, Options().width, 3), nn.Flatten(1), nn.LazyLinear(num_classes))

def tiny():
    return Net(5)

def number():
    return 3
"""


def test_a_function_or_a_class_of_a_file_is_a_model(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    assert source(f"{file}:tiny").build()[2].out_features == 5
    found = source(f"{file}:Net")
    assert found.build()[2].out_features == 3
    assert (found.library, found.size, found.takes) == (None, IMAGENET, IMAGES)
    assert type(source(f"{file}:resnet18").on_meta()).__name__ == "ResNet"
    with pytest.raises(ValueError, match=r"model: expected path.py:function with a file that exists, got .*other"):
        source(f"{tmp_path}/other.py:tiny")
    with pytest.raises(ValueError, match=r"model: expected .*mine.py:number to return a torch.nn.Module, got int"):
        source(f"{file}:number").on_meta()


@pytest.mark.parametrize(
    ("asked", "listed"),
    [
        ("mine.py", "such as Net, tiny, number, got ''"),
        ("mine.py:", "such as Net, tiny, number, got ''"),
        ("mine.py:tinny", "such as tiny, got 'tinny'"),
        ("empty.py", "of which it has none, got ''"),
    ],
)
def test_a_file_without_a_function_lists_its_functions_and_classes(asked, listed, tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "empty.py").write_text("from torchvision.models import resnet18\n")
    with pytest.raises(ValueError) as refusal:
        source(f"{tmp_path}/{asked}")
    path = f"{tmp_path}/{asked.partition(':')[0]}"
    assert str(refusal.value) == f"model: expected a function or a module class of {path}, {listed}"


def test_a_model_of_something_else_than_images_says_so():
    assert source("resnet18").of_images().name == "resnet18"
    with pytest.raises(ValueError) as refusal:
        source("torchvision.raft_small").of_images()
    assert str(refusal.value) == (
        "model: expected one that takes a tensor of images, got torchvision.raft_small, which takes pairs of images;"
        " explain, bench, train and compile run models of images alone, and doctor says what is fused of others"
    )
