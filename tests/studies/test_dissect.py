"""fusedres.studies.dissect: a block whole is the block, and its parts are what they are called."""

import pytest
import torch
from torch import nn

from fusedres.nn import plain
from fusedres.studies.dissect import blocks_of, dissected
from fusedres.train.network import build


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("name", "changes"), [("cifar_resnet20", 2), ("cifar_plain20", 9)])
def test_a_dissected_network_is_the_network(name, changes, fused):
    torch.manual_seed(0)
    exact = build(name, classes=10, channels=1, fused=False).model.eval()
    torch.manual_seed(0)
    model = dissected(build(name, classes=10, channels=1, fused=fused).model)
    x = torch.randn(4, 1, 8, 8)
    assert not model.training
    assert torch.equal(model(x), exact(x))
    assert len(blocks_of(model)) == 9
    assert [block.keeps_shape for block in blocks_of(model)].count(False) == changes


def test_the_network_itself_is_left_as_it_is():
    model = build("cifar_resnet20", classes=10, channels=1, fused=True).model
    blocks = [type(block) for block in model.layer1]
    dissected(model).conv1.weight.data.zero_()
    assert model.training
    assert [type(block) for block in model.layer1] == blocks
    assert model.conv1.weight.any()


def network(name):
    return dissected(build(name, classes=10, channels=1, fused=False).model)


def test_parts_of_a_residual_block():
    block = blocks_of(network("cifar_resnet20"))[1]
    x = torch.randn(2, 16, 8, 8).relu()
    inner = block.block
    residual = inner.bn2(inner.conv2(inner.bn1(inner.conv1(x)).relu()))
    for part, expected in (
        ("whole", (x + residual).relu()),
        ("gradient by shortcut", (x + residual).relu()),
        ("gradient by residual", (x + residual).relu()),
        ("shortcut", x),
    ):
        block.part = part
        torch.testing.assert_close(block(x), expected)


def test_layers_of_a_plain_network():
    same, strided = blocks_of(network("cifar_plain20"))[2:4]
    x = torch.randn(2, 16, 8, 8).relu()
    for block, kept in ((same, x), (strided, nn.functional.pad(x[..., ::2, ::2], (0, 0, 0, 0, 8, 8)))):
        inner = block.block
        for part, expected in (
            ("without layer 1", inner.bn2(inner.conv2(kept)).relu()),
            ("without layer 2", inner.bn1(inner.conv1(x)).relu()),
        ):
            block.part = part
            torch.testing.assert_close(block(x), expected)


def test_gradients_by_residual_and_by_shortcut_sum_to_the_whole():
    block = blocks_of(network("cifar_resnet20").double())[3]  # zero-padded shortcut, stride 2
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64, requires_grad=True)
    gradients = {}
    for part in ("whole", "gradient by shortcut", "gradient by residual"):
        block.part = part
        gradients[part] = torch.autograd.grad((block(x) ** 2).sum(), x)[0]
    both = gradients["gradient by shortcut"] + gradients["gradient by residual"]
    torch.testing.assert_close(both, gradients["whole"])
    assert all(gradient.norm() > 0 for gradient in gradients.values())


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), nn.Sequential(nn.Sequential(nn.Linear(2, 2), plain.BasicBlock(2, 2)))]
)
def test_networks_without_residual_blocks_are_refused(model):
    with pytest.raises(ValueError, match="model: expected stages of residual blocks"):
        dissected(model)
