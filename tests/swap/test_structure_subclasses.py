"""Subclasses of known blocks: one that changes nothing is fused, one that computes something else computes that."""

import pickle

import pytest
import torch
from torch.nn import functional as F

import fusedres
from tests.nn.twins import plain_copy, randomised, tensor
from tests.swap.accounts import assert_same_numbers, norms_called, norms_left

resnet = pytest.importorskip("torchvision").models.resnet


class Renamed(resnet.BasicBlock):
    """Changes nothing."""


class BuiltOtherwise(resnet.BasicBlock):
    """Another number of groups and a larger epsilon, the same forward."""

    def __init__(self, inplanes, planes, stride=1, downsample=None):
        super().__init__(inplanes, planes, stride, downsample)
        self.conv2.groups, self.conv2.weight = 2, torch.nn.Parameter(self.conv2.weight[:, ::2].clone())
        self.bn1.eps = 0.1


class Halved(resnet.BasicBlock):
    """Its own forward adds half of the branch."""

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(x + 0.5 * out)


class Wrapped(resnet.BasicBlock):
    """Its own forward does something to the result of the base's."""

    def forward(self, x):
        return 2 * super().forward(F.pad(x, (1, 1, 1, 1)))


class Decides(resnet.BasicBlock):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


def made(cls, *args):
    torch.manual_seed(0)
    return randomised(cls(*args)).double()


@pytest.mark.parametrize("cls", [Renamed, BuiltOtherwise, Halved, Wrapped])
def test_a_subclass_is_fused_by_what_it_computes(cls):
    fused = fusedres.fuse(made(cls, 8, 8))
    assert isinstance(fused, cls) and isinstance(fused, resnet.BasicBlock) and type(fused) is not cls
    assert norms_left(fused) == {} and norms_called(fused, tensor(2, 8, 7, 9)) == set()
    assert_same_numbers(fused, plain_copy(fused), tensor(3, 8, 7, 9))
    assert type(pickle.loads(pickle.dumps(fused))) is type(fused)
    assert type(fusedres.unfuse(fused)) is cls


def test_a_subclass_that_can_not_be_read_is_left_alone():
    fused = fusedres.fuse(made(Decides, 8, 8))
    left = norms_left(fused)
    assert set(left) == {"bn1", "bn2"} and all("values" in reason for reason in left.values())
    plain = plain_copy(fused)
    assert_same_numbers(fused, plain, tensor(3, 8, 7, 9) + 1)
    assert_same_numbers(fused, plain, tensor(3, 8, 7, 9) - 1)


def test_a_network_of_subclasses_is_fused_fully():
    model = fusedres.fuse(made(resnet.ResNet, Renamed, [1, 1, 1, 1], 5))
    assert norms_left(model) == {}
    assert_same_numbers(model, plain_copy(model), tensor(2, 3, 40, 33), tolerance=1e-8)
