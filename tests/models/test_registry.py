"""fusedres.models.registry."""

import pytest
import torch

from fusedres.models import CifarResNet, create, names


def test_a_network_by_name() -> None:
    model = create("cifar_resnet20", num_classes=7, in_channels=1)
    assert isinstance(model, CifarResNet)
    assert model(torch.rand(2, 1, 16, 16)).shape == (2, 7)


def test_every_name_builds_with_and_without_fused_blocks() -> None:
    with torch.device("meta"):
        for name in names():
            for fused in (True, False):
                assert create(name, fused=fused)(torch.empty(1, 3, 32, 32)).shape[0] == 1


def test_an_unknown_name_lists_near_ones() -> None:
    with pytest.raises(ValueError, match=r"model: expected .*cifar_resnet20.*, got 'cifar_resnet21'"):
        create("cifar_resnet21")
