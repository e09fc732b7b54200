"""What of a forward is done by which pass."""

import pytest
import torch
from torch import nn

import fusedres
from fusedres.nn.structured import FusedStructure, taken_apart
from tests.nn.twins import assert_twins, plain_copy, randomised, tensor


class Residual(nn.Module):
    """A residual block whose shortcut is given."""

    def __init__(self, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.conv, self.norm, self.shortcut = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), shortcut

    def forward(self, x):
        z = self.norm(self.conv(x))
        z += x if self.shortcut is None else self.shortcut(x)
        return z.relu_()


@pytest.mark.parametrize("make", [lambda: None, nn.Sequential, nn.Identity])
def test_what_does_nothing_is_the_identity(make):
    """Whose gradient joins in the pass that writes the input's."""
    structure, _ = taken_apart(Residual(make()), None)
    (step,) = structure.found.steps
    assert step.residual == step.x and step.projection is None


def test_a_layer_on_the_same_input_is_the_projection():
    structure, _ = taken_apart(Residual(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))), None)
    (step,) = structure.found.steps
    assert step.residual is None and step.projection is not None


class Positioned(nn.Module):
    """Adds a parameter, the same for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.place = nn.Parameter(torch.randn(1, 6, 7, 5))

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)) + self.place)


class Grey(nn.Module):
    """Its single channel is added to each of the branch's."""

    def __init__(self, *, lone: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.between = nn.Softplus() if lone else nn.Identity()

    def forward(self, x):
        return torch.relu(self.norm(self.between(self.conv(x))) + x)


class GreySum(Grey):
    def forward(self, x):
        return torch.relu(self.between(torch.relu(self.norm(self.conv(x)))) + x)


BROADCAST = {
    "a parameter": (Positioned, 4),
    "a chain and its input": (lambda: Grey(lone=False), 1),
    "a batch norm and the input": (lambda: Grey(lone=True), 1),
    "a sum and its activation": (lambda: GreySum(lone=True), 1),
}


@pytest.mark.parametrize(("make", "channels"), BROADCAST.values(), ids=BROADCAST)
def test_what_is_made_larger_to_be_added_is_added_by_pytorch(make, channels):
    model = fusedres.fuse(nn.Sequential(randomised(make())).double())
    assert_twins(model, plain_copy(model), tensor(3, channels, 7, 5))


def test_what_a_parameter_is_added_to_is_fused():
    model = fusedres.fuse(nn.Sequential(Positioned()))
    assert isinstance(model[0], FusedStructure) and fusedres.report(model).norms_fused == (1, 1)
