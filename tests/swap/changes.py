"""What users do to a block, before or after it is fused, and what is said of it then."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

resnet_module = pytest.importorskip("torchvision").models.resnet


def hooked(register: str, *path: str) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        getattr(block.get_submodule(".".join(path)), register)(lambda *_: None)

    return change


def replaced(name: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        new = make(block.get_submodule(name)).double()
        setattr(block.get_submodule(parent), child, new)

    return change


def attribute(module: str, name: str, value: Any) -> Callable[[nn.Module], None]:
    return lambda block: setattr(block.get_submodule(module), name, value)


def forward_of(module: str) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        target = block.get_submodule(module)
        target.forward = lambda x, original=target.forward: original(x) * 0.5

    return change


def strided_by_maximum(block: nn.Module) -> None:
    conv, bn = block.downsample
    block.downsample = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(conv.in_channels, conv.out_channels, 1), bn).double()


class UsersBottleneck(resnet_module.Bottleneck):
    def forward(self, x):
        return super().forward(x) * 2


class UsersConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class NamedConv(nn.Conv2d):
    """Which computes as its base does."""


def subclassed(block: nn.Module) -> None:
    block.__class__ = UsersBottleneck


def like(conv: nn.Conv2d, **keywords: Any) -> nn.Conv2d:
    kept = {"stride": conv.stride, "padding": conv.padding, "groups": conv.groups, "bias": False}
    return nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, **{**kept, **keywords})


LEFT_ALONE: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "forward hook on a convolution": (hooked("register_forward_hook", "conv1"), "conv1 has hooks"),
    "forward pre-hook on a batch norm": (hooked("register_forward_pre_hook", "bn2"), "bn2 has hooks"),
    "backward hook on the ReLU": (
        lambda b: (setattr(b.relu, "inplace", False), hooked("register_full_backward_hook", "relu")(b)),
        "relu has hooks",
    ),
    "backward pre-hook on a convolution": (
        hooked("register_full_backward_pre_hook", "conv3"), "conv3 has hooks"
    ),
    "forward hook on the shortcut": (hooked("register_forward_hook", "downsample"), "downsample has hooks"),
    "forward hook inside the shortcut": (
        hooked("register_forward_hook", "downsample", "0"), "downsample.0 has hooks"
    ),
    "backward hook inside the shortcut": (
        hooked("register_full_backward_hook", "downsample", "1"), "downsample.1 has hooks"
    ),
    "weight norm by hook": (lambda b: weight_norm(b.conv2), "conv2 has hooks"),
    "spectral norm by hook": (lambda b: spectral_norm(b.conv3), "conv3 has hooks"),
    "pruning": (lambda b: prune.l1_unstructured(b.conv1, "weight", 0.5), "conv1 has hooks"),
    "NaN momentum": (attribute("bn1", "momentum", float("nan")), "bn1.momentum is nan"),
    "forward of the block replaced": (forward_of(""), "forward was replaced"),
    "forward of a convolution replaced": (forward_of("conv2"), "conv2.forward was replaced"),
    "forward of a batch norm replaced": (forward_of("bn2"), "bn2.forward was replaced"),
    "forward of the ReLU replaced": (forward_of("relu"), "relu.forward was replaced"),
    "forward of the shortcut replaced": (forward_of("downsample"), "downsample.forward was replaced"),
}  # fmt: skip
"""The block runs its plain modules, whether it is changed before or after: why."""

FUSED_OTHERWISE: dict[str, tuple[Callable[[nn.Module], Any], str, dict[str, str]]] = {
    "weight norm": (lambda b: parametrizations.weight_norm(b.conv2), "conv2 is a ParametrizedConv2d", {}),
    "orthogonal weight": (lambda b: parametrizations.orthogonal(b.conv1), "conv1 is a ParametrizedConv2d", {}),
    "parametrized batch norm": (
        lambda b: nn.utils.parametrize.register_parametrization(b.bn1, "weight", nn.Softplus()),
        "bn1 is a ParametrizedBatchNorm2d",
        {"bn1": "bn1 is a ParametrizedBatchNorm2d, not a plain BatchNorm2d"},
    ),
    "batch norm removed": (replaced("bn3", lambda _: nn.Identity()), "bn3 is an Identity", {}),
    "group norm": (replaced("bn1", lambda bn: nn.GroupNorm(2, bn.num_features)), "bn1 is a GroupNorm", {}),
    "instance norm": (
        replaced("bn1", lambda bn: nn.InstanceNorm2d(bn.num_features)), "bn1 is a InstanceNorm2d", {}
    ),
    "another activation": (replaced("relu", lambda _: nn.CELU()), "relu is a CELU", {}),
    "an activation with a parameter": (replaced("relu", lambda _: nn.PReLU()), "relu is a PReLU", {}),
    "reflected padding": (
        replaced("conv2", lambda c: like(c, padding_mode="reflect")), "conv2 pads with 'reflect'", {}
    ),
    "padding by name": (replaced("conv1", lambda c: like(c, padding="same")), "conv1 pads with .*'same'", {}),
    "a convolution of one's own": (
        replaced("conv2", lambda c: UsersConv(c.in_channels, c.out_channels, 3, 2, 1)), "conv2 is a UsersConv", {}
    ),
    "infinite momentum": (
        attribute("downsample.1", "momentum", float("inf")), "downsample.1.momentum is inf",
        {"downsample.1": "momentum is inf"},
    ),
    "pooled shortcut": (strided_by_maximum, "downsample is a Sequential", {}),
    "a convolution without batch norm as shortcut": (
        replaced("downsample", lambda d: d[0]), "downsample is a Conv2d", {}
    ),
    "a block of one's own": (subclassed, "", {}),
}  # fmt: skip
"""Changed before it is fused, it is fused by what its forward computes, but for these batch norms, each with a reason;
changed after, it runs its plain modules: why."""
