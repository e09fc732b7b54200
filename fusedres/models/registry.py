"""Networks by name, for commands and configuration files."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from fusedres.models.cifar import cifar_plain, cifar_resnet, resnext, stochastic_resnet
from fusedres.models.densenet import COUNTS as DENSE_COUNTS
from fusedres.models.densenet import densenet, imagenet_densenet
from fusedres.models.imagenet import COUNTS, imagenet_plain, imagenet_resnet
from fusedres.models.iresnet import DEPTHS as IMPROVED_DEPTHS
from fusedres.models.iresnet import iresnet
from fusedres.models.libraries import library_network
from fusedres.models.preact import imagenet_preact_resnet, preact_resnet, wide_resnet
from fusedres.models.variants import ORDER_VARIANTS, VARIANTS, highway, variant_resnet

__all__ = ["Entry", "create", "entry", "names"]


class Entry(NamedTuple):
    """A network: what builds it, and the data it is made for.

    Attributes:
        build: takes ``num_classes``, ``fused`` and the network's own options.
        side: height and width of its images.
        num_classes: of the data set.
        library_name: ``"timm.resnest50d"`` where the network is timm's or torchvision's, None where it is our own.
    """

    build: Callable[..., nn.Module]
    side: int
    num_classes: int
    library_name: str | None = None


def _cifar(build: Callable[..., nn.Module], *args: Any, **options: Any) -> Entry:
    return Entry(partial(build, *args, **options), 32, 10)


def _imagenet(build: Callable[..., nn.Module], *args: Any, **options: Any) -> Entry:
    return Entry(partial(build, *args, **options), 224, 1000)


def _of(library_name: str, *, side: int = 224, num_classes: int = 1000) -> Entry:
    return Entry(partial(library_network, library_name), side, num_classes, library_name)


_REGNETS = ("400mf", "800mf", "1_6gf", "3_2gf", "8gf", "16gf", "32gf")
_OF_TORCHVISION = (
    "vgg16", "vgg16_bn", "vgg19", "vgg19_bn", "mobilenet_v2",
    *(f"regnet_{kind}_{size}" for kind in "xy" for size in _REGNETS),
)  # fmt: skip

_NETWORKS: dict[str, Entry] = {
    **{f"resnet{depth}": _imagenet(imagenet_resnet, depth) for depth in COUNTS},
    **{f"resnet{depth}_v1": _imagenet(imagenet_resnet, depth, stride_in_first=True) for depth in (50, 101, 152)},
    **{f"plain{depth}": _imagenet(imagenet_plain, depth) for depth in (18, 34)},
    **{f"cifar_resnet{depth}": _cifar(cifar_resnet, depth) for depth in (20, 32, 44, 56, 110, 1202)},
    **{f"cifar_plain{depth}": _cifar(cifar_plain, depth) for depth in (20, 32, 44, 56)},
    **{f"preact_resnet{depth}": _cifar(preact_resnet, depth) for depth in (110, 164, 1001)},
    "preact_resnet200": _imagenet(imagenet_preact_resnet, 200),
    **{
        f"resnet110_{variant}": _cifar(variant_resnet, 110, variant)
        for variant in VARIANTS
        if variant not in ("original", "full_preactivation")
    },
    **{
        f"resnet164_{order}": _cifar(variant_resnet, 164, order, bottleneck=True, shortcut="projection")
        for order in ORDER_VARIANTS
    },
    "highway19": _cifar(highway),
    "densenet40_k12": _cifar(densenet, 40, 12),
    "densenet100_k12": _cifar(densenet, 100, 12),
    "densenet100_k24": _cifar(densenet, 100, 24),
    "densenet_bc100_k12": _cifar(densenet, 100, 12, bc=True),
    "densenet_bc250_k24": _cifar(densenet, 250, 24, bc=True),
    "densenet_bc190_k40": _cifar(densenet, 190, 40, bc=True),
    **{f"densenet{depth}": _imagenet(imagenet_densenet, depth) for depth in DENSE_COUNTS},
    **{f"stochastic_resnet{depth}": _cifar(stochastic_resnet, depth) for depth in (110, 1202)},
    **{
        f"wide_resnet{depth}_{width}": _cifar(wide_resnet, depth, width)
        for depth, width in ((16, 8), (28, 10), (40, 1), (40, 2), (40, 4))
    },
    "resnext29_8x64": _cifar(resnext, 29, cardinality=8, base_width=64),
    "resnext29_16x64": _cifar(resnext, 29, cardinality=16, base_width=64),
    **{name: _of(f"torchvision.{name}") for name in _OF_TORCHVISION},
    "seresnet50": _of("timm.seresnet50"),
    "resnet50d": _of("timm.resnet50d"),
    **{f"iresnet{depth}": _imagenet(iresnet, depth) for depth in IMPROVED_DEPTHS},
    "resnest50": _of("timm.resnest50d"),
    "resnest101": _of("timm.resnest101e", side=256),
    "fasterrcnn_resnet50_fpn": _of("torchvision.fasterrcnn_resnet50_fpn", side=800, num_classes=91),
}


def names() -> Iterable[str]:
    """Every name that `create` knows, in the order of the papers."""
    return tuple(_NETWORKS)


def entry(name: str) -> Entry:
    """The `Entry` called ``name``.

    Raises:
        ValueError: there is none; the message lists near names.
        TypeError: ``name`` is no string.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a str, got {name!r}")
    if name not in _NETWORKS:
        near = difflib.get_close_matches(name, _NETWORKS, n=5, cutoff=0.4) or list(_NETWORKS)
        raise ValueError(f"model: expected the name of a network such as {', '.join(near)}, got {name!r}")
    return _NETWORKS[name]


def create(name: str, *, num_classes: int | None = None, fused: bool = True, **options: Any) -> nn.Module:
    """The network called ``name``.

    Args:
        name: one of `names`.
        num_classes: width of the classifier (the data set's own if None).
        fused: build from `fusedres.nn` blocks, or fuse what is a library's; otherwise its plain PyTorch twin.
        options: the network's own, such as ``in_channels``, or the library's, such as ``weights``.

    Raises:
        ValueError: no such network, or an option out of range.
        TypeError: an argument is of another type, or an option that the network has not.
        ImportError: the library that has the network is not installed.
    """
    found = entry(name)
    return found.build(num_classes=found.num_classes if num_classes is None else num_classes, fused=fused, **options)
