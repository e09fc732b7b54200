"""fusedres.studies.dissect: a block whole is the block, and its parts are what they are called."""

import pytest
import torch

from fusedres.studies.dissect import blocks_of, dissected_resnet
from fusedres.train.network import build


def test_a_dissected_network_is_the_network():
    torch.manual_seed(0)
    exact = build("cifar_resnet20", classes=10, channels=1, fused=False).model.eval()
    torch.manual_seed(0)
    model = dissected_resnet("cifar_resnet20").eval()
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(model(x), exact(x))
    assert len(blocks_of(model)) == 9
    assert [block.keeps_shape for block in blocks_of(model)] == [True] * 3 + [False, True, True] * 2


def test_parts_of_a_block():
    block = blocks_of(dissected_resnet("cifar_resnet20").eval())[1]
    x = torch.randn(2, 16, 8, 8).relu()
    inner = block.block
    residual = inner.bn2(inner.conv2(inner.bn1(inner.conv1(x)).relu()))
    for part, expected in (
        ("whole", (x + residual).relu()),
        ("gradient by shortcut", (x + residual).relu()),
        ("gradient by residual", (x + residual).relu()),
        ("shortcut", x),
        ("residual", residual.relu()),
    ):
        block.part = part
        torch.testing.assert_close(block(x), expected)


def test_gradients_by_residual_and_by_shortcut_sum_to_the_whole():
    block = blocks_of(dissected_resnet("cifar_resnet20").double().eval())[3]  # zero-padded shortcut, stride 2
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64, requires_grad=True)
    gradients = {}
    for part in ("whole", "gradient by shortcut", "gradient by residual"):
        block.part = part
        gradients[part] = torch.autograd.grad((block(x) ** 2).sum(), x)[0]
    both = gradients["gradient by shortcut"] + gradients["gradient by residual"]
    torch.testing.assert_close(both, gradients["whole"])
    assert all(gradient.norm() > 0 for gradient in gradients.values())


def test_networks_without_basic_blocks_are_refused():
    pytest.importorskip("torchvision")
    for name in ("vgg11", "resnext50_32x4d", "nonsense"):
        with torch.device("meta"), pytest.raises(ValueError, match="model: expected"):
            dissected_resnet(name)


@pytest.mark.parametrize("name", ["cifar_plain20", "plain18"])
def test_networks_without_shortcuts_are_refused(name):
    with torch.device("meta"), pytest.raises(ValueError, match=f"model: expected a network with shortcuts .*'{name}'"):
        dissected_resnet(name)
