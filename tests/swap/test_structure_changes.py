"""A fused module that is changed after it was read computes what its plain twin does after the same change."""

import pytest
import torch
from torch import nn

import fusedres
from tests.nn.twins import randomised, tensor
from tests.swap.accounts import assert_same_numbers, norms_called
from tests.zoo.between import Between, DropPath
from tests.zoo.chains import InvertedResidual
from tests.zoo.cifar_plain import SeparableBlock
from tests.zoo.cifar_resnet import BasicBlock, PreActBlock
from tests.zoo.spellings import Branch, Listed, Plus
from tests.zoo.yolo import C2f, Conv


def conv(width=8, kernel=3, **options):
    return nn.Conv2d(8, width, kernel, padding=kernel // 2, **options).double()


def norm(width=8):
    return randomised(nn.BatchNorm2d(width)).double()


def projection():
    return nn.Sequential(conv(kernel=1, bias=False), norm())


def more_layers(block):
    block.convs.append(conv())
    block.norms.append(norm())


def fewer_layers(block):
    del block.convs[1], block.norms[1]


def set_attributes(path, **values):
    def change(module):
        for name, value in values.items():
            setattr(module.get_submodule(path), name, value() if callable(value) else value)

    return change


CHANGES = {
    "layers are appended": (Listed, more_layers),
    "layers are taken out": (Listed, fewer_layers),
    "a list that is gone through grows": (
        lambda: C2f(8, 8, 1),
        lambda block: (block.m.append(Conv(4, 4).double()), setattr(block, "cv2", Conv(16, 8).double())),
    ),
    "a sequence grows": (
        lambda: BasicBlock(8, 8),
        lambda block: block.shortcut.extend([conv(kernel=1), norm()]),
    ),
    "a sequence gets a hook": (Branch, lambda block: block.residual.register_forward_hook(lambda m, i, o: o + 1)),
    "a shortcut appears": (Branch, set_attributes("", downsample=projection)),
    "an attribute appears": (lambda: PreActBlock(8, 8), set_attributes("", shortcut=lambda: conv(kernel=1))),
    "a shortcut disappears": (
        lambda: Branch(8, 8),
        lambda block: (setattr(block, "downsample", projection()), setattr(block, "downsample", None)),
    ),
    "a flag is turned": (InvertedResidual, set_attributes("", use_res_connect=False)),
    "a probability changes": (lambda: Between(outer=DropPath(0.5)), set_attributes("outer", drop_prob=0.1)),
    "a probability becomes 0": (lambda: Between(outer=DropPath(0.5)), set_attributes("outer", drop_prob=0.0)),
    "a convolution is dilated": (Plus, set_attributes("conv1", dilation=(2, 2), padding=(2, 2))),
    "a convolution has groups": (Plus, set_attributes("conv2", weight=lambda: nn.Parameter(conv(groups=2).weight),
                                                      groups=2)),
    "a convolution reflects": (Plus, set_attributes("", conv1=lambda: conv(padding_mode="reflect"))),
    "a convolution gets a bias": (Plus, set_attributes("", conv1=conv)),
    "a depthwise convolution is replaced": (lambda: SeparableBlock(8, 8), set_attributes("", conv1=conv)),
    "epsilon and momentum": (Plus, set_attributes("bn1", eps=0.2, momentum=0.7)),
    "another norm": (Plus, set_attributes("", bn2=lambda: nn.GroupNorm(2, 8).double())),
    "a norm without affine map": (Plus, set_attributes("bn1", weight=None, bias=None, affine=False)),
    "no norm": (Plus, set_attributes("", bn1=nn.Identity)),
    "another activation": (Between, set_attributes("", relu=lambda: nn.LeakyReLU(0.3))),
    "an unknown activation": (Between, set_attributes("", relu=nn.Softplus)),
    "a weight is frozen": (Plus, lambda block: block.conv1.weight.requires_grad_(False)),
    "a norm is frozen": (Plus, lambda block: block.bn2.requires_grad_(False)),
    "everything is frozen": (Plus, lambda block: block.requires_grad_(False)),
    "weights are tied": (Plus, lambda block: setattr(block.conv2, "weight", block.conv1.weight)),
    "layers change places": (
        Plus,
        lambda block: (block.__dict__["_modules"].update(bn1=block.bn2, bn2=block.bn1)),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "change"), CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen_at_the_next_call(make, change):
    torch.manual_seed(0)
    fused = randomised(make()).double()
    plain = make().double()
    plain.load_state_dict(fused.state_dict())
    fusedres.fuse(fused)
    x = tensor(3, 8, 8, 10)
    assert norms_called(fused, x) == set()
    plain(x)
    assert_same_numbers(fused, plain, x)
    for module in (fused, plain):
        torch.manual_seed(3)
        change(module)
    assert_same_numbers(fused, plain, x)


def test_a_class_attribute_is_looked_up_at_the_next_call(monkeypatch):
    torch.manual_seed(0)
    fused, plain = (randomised(C2f(8, 8, 1)).double() for _ in range(2))
    plain.load_state_dict(fused.state_dict())
    fusedres.fuse(fused)
    x = tensor(3, 8, 8, 10)
    assert_same_numbers(fused, plain, x)
    monkeypatch.setattr(Conv, "forward", lambda self, x: torch.tanh(self.bn(self.conv(x))))
    assert_same_numbers(fused, plain, x)
