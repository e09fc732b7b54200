"""fusedres.models.registry."""

import pytest
import torch

from fusedres.models import ResNet, create, entry, names


def test_a_network_by_name() -> None:
    model = create("cifar_resnet20", num_classes=7, in_channels=1)
    assert isinstance(model, ResNet)
    assert model(torch.rand(2, 1, 16, 16)).shape == (2, 7)


DEEP = ("1001", "1202", "190", "250", "16gf", "32gf")
"""What takes seconds to build."""


QUICK = (
    "resnet18", "plain18", "cifar_resnet20", "preact_resnet110", "highway19",
    "densenet40_k12", "wide_resnet16_8", "resnext29_8x64", "iresnet50",
)  # fmt: skip


OWN = [name for name in names() if entry(name).library_name is None]


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in OWN])
def test_every_name_builds_with_and_without_fused_blocks(name: str) -> None:
    """With the same keys and shapes, and the classes of its data set."""
    with torch.device("meta"):
        fused, plain = (create(name, fused=fused).state_dict() for fused in (True, False))
        assert create(name, num_classes=7, in_channels=1, fused=False).eval()(torch.empty(1, 1, 32, 32)).shape == (1, 7)
    assert {key: value.shape for key, value in fused.items()} == {key: value.shape for key, value in plain.items()}
    assert list(plain.values())[-1].shape == (entry(name).num_classes,)


def test_an_unknown_name_lists_near_ones() -> None:
    with pytest.raises(ValueError, match=r"model: expected .*cifar_resnet20.*, got 'cifar_resnet21'"):
        create("cifar_resnet21")


@pytest.mark.parametrize("name", [None, 3, ["cifar_resnet20"]])
def test_a_name_of_another_type_is_refused(name: object) -> None:
    with pytest.raises(TypeError, match="name: expected a str, got "):
        create(name)


@pytest.mark.parametrize(
    ("num_classes", "error", "message"),
    [
        (0, ValueError, "num_classes must be at least 1, got 0"),
        (-3, ValueError, "num_classes must be at least 1, got -3"),
        ("10", TypeError, "num_classes must be a whole number, got '10'"),
        (10.0, TypeError, "num_classes must be a whole number, got 10.0"),
    ],
)
@pytest.mark.parametrize("name", QUICK)
def test_classes_that_are_no_number_of_them_are_refused(
    name: str, num_classes: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        create(name, num_classes=num_classes)
