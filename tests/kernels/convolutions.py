"""The convolutions of the listed networks, read off the networks, and operands for them."""

import functools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fusedres.models import cifar_resnet
from fusedres.operands import Geometry
from tests.comparison import relative_error
from tests.kernels.executed import activation


class Conv(NamedTuple):
    """A convolution: (N, C, H, W) of its input, K, window, geometry."""

    size: tuple[int, int, int, int]
    k: int
    window: tuple[int, int]
    geometry: Geometry = Geometry()

    @property
    def name(self) -> str:
        n, c, h, w = self.size
        stride, padding, dilation, groups = self.geometry
        parts = [f"{c}to{self.k}", f"{self.window[0]}x{self.window[1]}", f"on{n}x{h}x{w}"]
        parts += [f"stride{stride[0]}x{stride[1]}"] if stride != (1, 1) else []
        parts += [f"pad{padding[0]}x{padding[1]}"] if padding != (0, 0) else []
        parts += [f"dilation{dilation[0]}x{dilation[1]}"] if dilation != (1, 1) else []
        return "-".join(parts + ([f"groups{groups}"] if groups > 1 else []))

    @property
    def macs(self) -> int:
        p, q = self.geometry.output_size(self.size[2], self.size[3], self.window)
        return self.size[0] * p * q * self.k * self.size[1] // self.geometry.groups * self.window[0] * self.window[1]

    def smaller(self, macs: int) -> "Conv":
        """The same channels and window on as many pixels as cost about ``macs``, but no fewer than a window has."""
        n, c, h, w = self.size
        least = max(self.window) + 1
        shrunk = self
        while shrunk.macs > macs and h > least:
            h, w = max(least, h - h // 4 - 1), max(least, w - w // 4 - 1)
            shrunk = self._replace(size=(n, c, h, w))
        return shrunk

    @property
    def depth(self) -> int:
        """Products that make an output."""
        return self.size[1] // self.geometry.groups * self.window[0] * self.window[1]

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Of a size that gives outputs like the inputs, channels_last."""
        c = self.size[1] // self.geometry.groups
        drawn = torch.randn(self.k, c, *self.window) / (c * self.window[0] * self.window[1]) ** 0.5
        return drawn.to(dtype).contiguous(memory_format=torch.channels_last)

    def input(self, dtype: torch.dtype) -> Tensor:
        return activation(self.size, dtype)


@functools.cache
def convolutions_of(network: str) -> tuple[Conv, ...]:
    """Every distinct convolution that a network runs, in order, on one image."""
    torchvision = pytest.importorskip("torchvision")
    found: dict[Conv, None] = {}

    def note(module: nn.Conv2d, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        geometry = Geometry(module.stride, module.padding, module.dilation, module.groups)
        found[Conv(tuple(inputs[0].shape), module.out_channels, module.kernel_size, geometry)] = None

    with torch.device("meta"):
        if network == "cifar_resnet20":
            model, side = cifar_resnet(20), 32
        else:
            model, side = getattr(torchvision.models, network)(), 224
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        model.eval()(torch.empty(1, 3, side, side))
    return tuple(found)


NETWORKS = ("resnet18", "resnet50", "resnext50_32x4d", "densenet121", "cifar_resnet20")


def as_tf32(tensor: Tensor) -> Tensor:
    """The nearest number that tensor cores take for an fp32 one: 10 bits after the leading one."""
    return ((tensor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def one_by_one(terms: int) -> float:
    """The relative error of adding as many random terms in fp32 one after the other: the library adds blocks of them.

    The k-th sum is of size sqrt(k) and is rounded by up to half a unit, evenly distributed:
    eps / (2 sqrt(3)) * sqrt(sum of k) / sqrt(terms).
    """
    return torch.finfo(torch.float32).eps * (terms / 24) ** 0.5


def assert_as_accurate(
    ours: Tensor, eager: Tensor, exact: Tensor, tf32: Tensor | None, terms: int, name: str = "tensor"
) -> None:
    """1.5 times eager's error at most, or the error of the product in ``tf32`` or of sums taken `one_by_one`."""
    errors = [relative_error(eager, exact), 0.0 if tf32 is None else relative_error(tf32, exact), one_by_one(terms)]
    # The library's gradients in 16 bits on a CPU are NaN now and then, which excuses nothing.
    theirs = max(error for error in errors if error == error)
    allowed = max(1.5 * theirs, torch.finfo(ours.dtype).eps * (4 if ours.dtype == torch.float32 else 0.5))
    error = relative_error(ours, exact)
    assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"
