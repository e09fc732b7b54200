"""fusedres.models.sources: a model is found by its name once, for every command."""

import pytest
import torch

from fusedres import models
from fusedres.models.sources import library_source, source, timm_name, torchvision_source


def test_the_library_comes_first_and_is_plain():
    found = source("resnet18")
    assert found.size == (3, 224, 224)
    with torch.device("meta"):
        assert type(found.build()) is models.network.ResNet
        assert found.build(num_classes=7).fc.out_features == 7


def test_torchvision_is_imported_where_its_model_is_built_and_takes_options():
    pytest.importorskip("torchvision")
    found = library_source("vgg11")
    assert found is not None and found.name == "vgg11"
    with torch.device("meta"):
        assert found.build(num_classes=7).classifier[-1].out_features == 7
        assert torchvision_source("vgg11").build().classifier[-1].out_features == 1000
    assert torchvision_source("no such model").size == (3, 224, 224)


def test_timm_has_names_of_its_own_behind_a_prefix():
    assert [timm_name(name) for name in ("timm.a", "timm/a", "a.timm", "timm")] == ["a", "a", None, None]
    pytest.importorskip("timm")
    bare, dotted = library_source("resnet26t"), library_source("timm.resnet26t")
    assert bare is not None and dotted is not None and bare.size == dotted.size == (3, 256, 256)


def test_what_no_library_has_is_none_there_and_refused_with_near_names():
    assert library_source("resnet55") is None and library_source("timm.resnet55") is None
    with pytest.raises(ValueError, match=r"model: expected a name such as .*resnet50.*, or path\.py:function, got"):
        source("resnet55")
