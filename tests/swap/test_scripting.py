"""torch.jit.script of fused models: the plain classes are compiled, and the live model stays as it is."""

import copy

import pytest
import torch
from torch import nn

import fusedres
from fusedres import nn as fnn
from fusedres.nn import plain as plain_blocks
from tests.nn.twins import assert_same_pass, assert_unchanged, randomised, run, snapshot, tensor

IMAGES = (2, 3, 32, 32)
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")


def classes(model: nn.Module) -> dict[str, tuple[type, int]]:
    return {name: (type(module), id(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "densenet121"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_torchvision_models(name, training):
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    plain = getattr(models, name)(num_classes=5).double().train(training)
    fused = fusedres.fuse(copy.deepcopy(plain))
    live, tensors = classes(fused), snapshot(fused)
    scripted = torch.jit.script(fused)
    assert classes(fused) == live
    assert_unchanged(fused, tensors)
    assert_same_pass(run(scripted, tensor(*IMAGES)), run(plain, tensor(*IMAGES)), 1e-12)


@pytest.mark.parametrize("schedule", ["auto", "moments"])
def test_parameters_and_statistics_are_shared(schedule):
    models = pytest.importorskip("torchvision").models
    fused = fusedres.fuse(models.resnet18(num_classes=5).double(), schedule=schedule)
    scripted = torch.jit.script(fused)
    ours, theirs = fused.state_dict(), scripted.state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in ours)
    assert fused.layer1[0].fused_schedule == schedule


@pytest.mark.parametrize("block", [lambda: fnn.ConvBNAct(3, 6), lambda: fnn.BNAct(3), lambda: fnn.Transition(3, 2)])
def test_blocks(block):
    fused = randomised(block().double())
    plain, kind = fusedres.unfuse(copy.deepcopy(fused)), type(fused)
    assert_same_pass(run(torch.jit.script(fused), tensor(*IMAGES)), run(plain, tensor(*IMAGES)), 1e-12)
    assert type(fused) is kind is not type(plain)


def test_a_fused_model_in_a_container_of_the_user():
    """PyTorch writes what it compiles into the children of a container that is not fused: `fuse` makes it fused."""
    model = nn.Sequential(fnn.ConvBNAct(3, 4), nn.Sequential(fnn.ConvBNAct(4, 5), nn.Flatten())).double()
    parameters = dict(model.named_parameters())
    scripted = torch.jit.script(model)
    assert torch.equal(scripted.eval()(tensor(*IMAGES)), model.eval()(tensor(*IMAGES)))
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert type(model[1][0]) is plain_blocks.ConvBNAct
    fusedres.fuse(model)
    assert type(model[0]) is type(model[1][0]) is fnn.ConvBNAct
