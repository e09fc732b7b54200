"""fusedres.nn.plain: the twins are torchvision's blocks, and refuse what they can not be."""

import pytest
import torch
from torch import nn

from fusedres.nn import plain
from tests.nn.twins import assert_same_pass, randomised, run, tensor


def projection(channels: int, out: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("kind", "expansion"), [("BasicBlock", 1), ("Bottleneck", 4)])
def test_blocks_are_torchvisions(kind, expansion, stride):
    resnet = pytest.importorskip("torchvision").models.resnet
    ours = randomised(getattr(plain, kind)(6, 8, stride)).double()
    theirs = getattr(resnet, kind)(6, 8, stride, projection(6, 8 * expansion, stride)).double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = tensor(3, 6, 7, 5)
    assert_same_pass(run(ours, x), run(theirs, x))


def test_identity_where_the_shape_stays():
    assert plain.BasicBlock(8, 8).downsample is None
    assert plain.Bottleneck(32, 8, shortcut="identity").downsample is None


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: plain.BasicBlock(8, 8, shortcut="conv"), "shortcut: .*'conv'"),
        (lambda: plain.BasicBlock(8, 9, shortcut="identity"), "shortcut: .*8 -> 9"),
        (lambda: plain.Bottleneck(32, 8, 2, shortcut="identity"), "shortcut: .*stride 2"),
        (lambda: plain.ConvBNAct(3, 4, act="celu"), "act: .*'celu'"),
    ],
)
def test_what_can_not_be_built_is_refused(make, names):
    with pytest.raises(ValueError, match=names):
        make()


def test_zero_pad_shortcut_takes_every_other_pixel_and_adds_channels_on_both_sides():
    x = torch.arange(2 * 3 * 3, dtype=torch.float64).view(1, 2, 3, 3)
    z = plain.ZeroPadShortcut(5, 2)(x)
    assert z.shape == (1, 5, 2, 2)
    assert z[0, 0].eq(0).all() and z[0, 3:].eq(0).all()
    assert z[0, 1].tolist() == [[0, 2], [6, 8]]
    assert repr(plain.ZeroPadShortcut(5, 2)) == "ZeroPadShortcut(5, stride=2)"
