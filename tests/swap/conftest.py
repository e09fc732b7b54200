"""Small members of every family that can be swapped."""

import pytest
import torch
from torch import nn

from fusedres.nn import plain


def own_blocks() -> nn.Module:
    """Blocks of the project, plain, with every kind of shortcut and of order."""
    return nn.Sequential(
        plain.ConvBNAct(3, 8),
        plain.BasicBlock(8, 8),
        plain.BasicBlock(8, 12, 2),
        plain.BasicBlock(12, 17, 2, shortcut="zero_pad"),
        plain.Bottleneck(17, 4),
        plain.Bottleneck(16, 4, groups=2, base_width=64),
        plain.PreActBasicBlock(16, 16),
        plain.PreActBottleneck(16, 4),
        plain.BNAct(16),
        plain.ScaledBlock(16, 16),
        plain.ActivationBasicBlock(16, 16, order="bn_after_add"),
        plain.ConvBNAct(16, 20, 1, act=None),
    )


def tiny(block: str) -> nn.Module:
    """A torchvision ResNet of two blocks: the wide stages, where all the weights are, left out."""
    resnet = pytest.importorskip("torchvision").models.resnet
    kind = getattr(resnet, block)
    with torch.device("meta"):
        model = resnet.ResNet(kind, [1, 1, 1, 1], num_classes=5)
        model.layer3, model.layer4 = nn.Identity(), nn.Identity()
        model.fc = nn.Linear(128 * kind.expansion, 5)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


SMALL = {
    "own blocks": own_blocks,
    "torchvision, basic": lambda: tiny("BasicBlock"),
    "torchvision, bottleneck": lambda: tiny("Bottleneck"),
}


@pytest.fixture(params=SMALL.values(), ids=SMALL)
def small(request: pytest.FixtureRequest) -> nn.Module:
    """A plain fp64 model in training mode."""
    torch.manual_seed(0)
    return request.param().double()


@pytest.fixture
def resnet() -> nn.Module:
    """A plain fp64 torchvision ResNet of two bottlenecks."""
    torch.manual_seed(0)
    return tiny("Bottleneck").double()
