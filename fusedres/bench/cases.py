"""What is measured: single ops with the shapes of ResNets, blocks, and whole networks, by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusedres.models.sources import Source, in_one_line, source
from fusedres.traffic.tensors import first_tensor

if TYPE_CHECKING:
    from fusedres.bench.setting import Setting

__all__ = ["BLOCKS", "Case", "ModelCase", "OpCase", "block", "damp", "near", "network"]

# Gamma where a block's branch ends. With 1, as libraries initialise it, the bf16 gradient of a ResNet-50 of random
# weights is noise (its error against fp64 is 1.3), and nothing could be told from anything; with 0.2 it is 0.3.
BRANCH_GAMMA = 0.2


@dataclass(frozen=True)
class ModelCase:
    """A block or a network, plain.

    Attributes:
        name: of the case.
        kind: ``"block"`` or ``"network"``.
        build: makes it, in fp32.
        channels: of the input.
        px: height and width of the input, unless told otherwise.
        batch: images, unless told otherwise.
    """

    name: str
    kind: str
    build: Callable[[], nn.Module]
    channels: int
    px: int
    batch: int

    @property
    def modes(self) -> tuple[str, ...]:
        return ("train", "infer")

    def on_meta(self) -> nn.Module:
        """The plain model on the meta device, in training mode."""
        return Source(self.name, self.build, (self.channels, self.px, self.px)).on_meta()

    def model(self, seed: int = 0) -> nn.Module:
        """The plain model with weights drawn from ``seed``, channels_last, on the CPU."""
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(seed)
            model = damp(self.build())
        return model.to(memory_format=torch.channels_last)

    def data(self, setting: Setting, seed: int) -> tuple[Tensor, Tensor]:
        """Images or activations, and labels or the gradient that arrives at the output; fp32, on the CPU.

        A label for each image, or for each pixel where that is what the network classifies.
        """
        generator = torch.Generator().manual_seed(seed)
        shape = (setting.batch, self.channels, setting.px, setting.px)
        x = torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)
        size = output_size(self, setting.px)
        if self.kind == "network":
            return x, torch.randint(0, size[0], (setting.batch, *size[1:]), generator=generator)
        arriving = torch.randn((setting.batch, *size), generator=generator)
        return x, arriving.contiguous(memory_format=torch.channels_last)


@cache
def output_size(case: ModelCase, px: int) -> tuple[int, ...]:
    """Shape of the output, the first of several, for one image of ``px`` pixels, without the batch.

    Raises:
        ValueError: the model can not be built, can not take such images, or gives no classes or channels.
    """
    model = case.on_meta().eval()
    try:
        with torch.device("meta"):
            output = model(torch.empty(2, case.channels, px, px))
    except Exception as error:
        raise ValueError(f"px: {case.name} can not take images of {px} x {px} pixels: {in_one_line(error)}") from error
    shape = first_tensor(output).shape
    if len(shape) < 2:
        raise ValueError(f"model: expected one that gives (N, classes, ...), got {tuple(shape)} from {case.name}")
    return tuple(shape[1:])


def damp(model: nn.Module) -> nn.Module:
    """Set gamma to `BRANCH_GAMMA` where the branch of a residual block ends. In place."""
    for module in model.modules():
        children = dict(module.named_children())
        end = children.get("bn3") or children.get("bn2")
        if "conv2" in children and isinstance(end, nn.BatchNorm2d) and end.affine:
            nn.init.constant_(end.weight, BRANCH_GAMMA)
    return model


@dataclass(frozen=True)
class OpCase:
    """A primitive, with separate library calls that do the same.

    Attributes:
        name: of the case.
        operands: from batch, px, dtype and a generator to the operands, on the CPU.
        plain: separate calls into PyTorch.
        fused: the op of `fusedres.ops`.
        px, batch: unless told otherwise.
        cudnn: the same as a graph of cuDNN's, where it has one.
    """

    name: str
    operands: Callable[[int, int, torch.dtype, torch.Generator], tuple[Any, ...]]
    plain: Callable[..., Any]
    fused: Callable[..., Any]
    px: int
    batch: int
    cudnn: Callable[..., Any] | None = None
    kind: str = "op"
    modes: tuple[str, ...] = ("op",)

    def data(self, setting: Setting, seed: int) -> tuple[Any, ...]:
        return self.operands(setting.batch, setting.px, setting.storage, torch.Generator().manual_seed(seed))


Case = ModelCase | OpCase


def network(name: str) -> ModelCase:
    """The plain network called so, by the rule of `models.sources.source`.

    Raises:
        ValueError: there is none, for which near names are listed, or it takes something else than images.
        ImportError: the library it is of is not installed.
    """
    found = source(name).of_images()
    channels, side, _ = found.size
    return ModelCase(name, "network", found.build, channels, side, 128 if found.library == "fusedres" else 64)


def _basic(channels: int, stride: int = 1) -> nn.Module:
    from torchvision.models.resnet import BasicBlock

    inside = channels // stride
    return BasicBlock(inside, channels, stride, _projection(inside, channels, stride) if stride > 1 else None)


def _bottleneck(inside: int, width: int, stride: int = 1) -> nn.Module:
    from torchvision.models.resnet import Bottleneck

    projected = inside != 4 * width
    return Bottleneck(inside, width, stride, _projection(inside, 4 * width, stride) if projected else None)


def _projection(channels: int, out: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))


def _blocks() -> dict[str, ModelCase]:
    found = {}
    for stage, (width, px) in enumerate(((64, 56), (128, 28), (256, 14), (512, 7)), start=1):
        makes = {f"basic{stage}": (partial(_basic, width), width, px)}
        makes[f"bottleneck{stage}"] = (partial(_bottleneck, 4 * width, width), 4 * width, px)
        if stage > 1:
            makes[f"basic{stage}_down"] = (partial(_basic, width, 2), width // 2, 2 * px)
            makes[f"bottleneck{stage}_down"] = (partial(_bottleneck, 2 * width, width, 2), 2 * width, 2 * px)
        else:
            makes[f"bottleneck{stage}_down"] = (partial(_bottleneck, width, width), width, px)
        for name, (build, channels, side) in makes.items():
            found[name] = ModelCase(name, "block", build, channels, side, 64)
    return found


# The blocks of ResNet-18/34 and ResNet-50/101/152 by stage; `_down` is the first of its stage, with a projection.
BLOCKS = _blocks()


def block(name: str) -> ModelCase:
    """A block of `BLOCKS`.

    Raises:
        ValueError: there is none; near names are listed.
    """
    if name not in BLOCKS:
        raise ValueError(near("block", name, BLOCKS))
    return BLOCKS[name]


def near(what: str, name: str, known: Iterable[str]) -> str:
    """A refusal of ``name`` that lists the nearest ``known`` ones."""
    every = list(dict.fromkeys(known))
    found = difflib.get_close_matches(name, every, n=5, cutoff=0.4) or every[:12]
    return f"{what}: expected one such as {', '.join(found)}, got {name!r}"
