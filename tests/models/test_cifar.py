"""fusedres.models.cifar: sizes of the paper, and twins that are the same network."""

import pytest
import torch

from fusedres.models import cifar_resnet
from fusedres.nn import BasicBlock, plain


def test_depth_counts_the_weighted_layers():
    weighted = [m for m in cifar_resnet(44).modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(weighted) == 44


def test_projection_adds_one_convolution_and_batch_norm_to_each_of_two_stages():
    extra = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    model = cifar_resnet(20, shortcut="projection")
    assert sum(p.numel() for p in model.parameters()) == 269_722 + extra


def test_stages_halve_the_resolution():
    model = cifar_resnet(8)
    x = model.relu(model.bn1(model.conv1(torch.zeros(2, 3, 32, 32))))
    shapes = []
    for stage in (model.layer1, model.layer2, model.layer3):
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_initialisation_is_he_fan_out():
    torch.manual_seed(0)
    weight = cifar_resnet(20).layer3[2].conv2.weight
    # std = sqrt(2 / (64 * 3 * 3)); with 36,864 draws the sample is within 1.5 %, four standard errors.
    assert weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.015)


@pytest.mark.parametrize("shortcut", ["zero_pad", "projection"])
def test_twins_of_one_seed_are_the_same_network(shortcut):
    models = []
    for fused in (True, False):
        torch.manual_seed(3)
        models.append(cifar_resnet(14, shortcut=shortcut, in_channels=1, num_classes=7, fused=fused).double())
    fused, unfused = models
    assert any(isinstance(m, BasicBlock) for m in fused.modules())
    assert not any(isinstance(m, BasicBlock) for m in unfused.modules())
    assert sum(isinstance(m, plain.BasicBlock) for m in unfused.modules()) == 6
    assert list(fused.state_dict()) == list(unfused.state_dict())
    for a, b in zip(fused.state_dict().values(), unfused.state_dict().values(), strict=True):
        assert torch.equal(a, b)

    x = torch.randn(3, 1, 9, 11, dtype=torch.float64)
    outputs = [model(x) for model in models]
    assert outputs[0].shape == (3, 7)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-10, atol=1e-12)
    for output in outputs:
        output.square().sum().backward()
    for (name, a), b in zip(fused.named_parameters(), unfused.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-10 * b.grad.norm(), name


@pytest.mark.parametrize("depth", [0, 2, 7, 18, 21, -4])
def test_depth_that_is_not_6n_plus_2_is_refused(depth):
    with pytest.raises(ValueError, match=rf"depth must be 6n \+ 2.*got {depth}"):
        cifar_resnet(depth)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"shortcut": "identity"}, "shortcut must be one of 'zero_pad', 'projection', .*got 'identity'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        cifar_resnet(20, **arguments)
