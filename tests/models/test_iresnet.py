"""fusedres.models.iresnet: the keys and the numbers of the network as it is written elsewhere."""

import pytest
import torch

from fusedres.models import iresnet
from fusedres.models.iresnet import improved_resnet
from tests.comparison import relative_error
from tests.nn.twins import randomised
from tests.zoo.iresnet import IResNet


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("counts", [(2, 3), (3, 4)])
def test_weights_with_the_authors_keys_load_strictly_and_give_the_same_logits(counts, fused):
    torch.manual_seed(0)
    theirs = randomised(IResNet(counts, width=64, num_classes=5)).double().eval()
    ours = improved_resnet(counts, (64, 128), num_classes=5, fused=fused).double().eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(ours(x), theirs(x)) <= 1e-9


def test_stages_halve_the_resolution_and_the_stem_pools_nothing():
    with torch.device("meta"):
        model = iresnet(50, fused=False)
        x = model.stem(torch.empty(1, 3, 224, 224))
        shapes = [tuple(x.shape[1:])]
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            x = stage(x)
            shapes.append(tuple(x.shape[1:]))
    assert shapes == [(64, 112, 112), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]


@pytest.mark.parametrize(
    ("depth", "options", "message"),
    [
        (34, {}, "depth must be one of 50, 101, 152, got 34"),
        (50, {"num_classes": 0}, "num_classes must be at least 1, got 0"),
        (50, {"in_channels": 0}, "in_channels must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(depth, options, message):
    with pytest.raises(ValueError, match=message):
        iresnet(depth, **options)
