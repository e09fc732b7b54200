"""Networks by name, for commands and configuration files."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from fusedres.models.cifar import cifar_resnet

__all__ = ["Entry", "create", "entry", "names"]


class Entry(NamedTuple):
    """A network: what builds it, and the data it is made for.

    Attributes:
        build: takes ``num_classes``, ``fused`` and the network's own options.
        side: height and width of its images.
        num_classes: of the data set.
    """

    build: Callable[..., nn.Module]
    side: int
    num_classes: int


_NETWORKS: dict[str, Entry] = {
    f"cifar_resnet{depth}": Entry(partial(cifar_resnet, depth), 32, 10) for depth in (20, 32, 44, 56, 110, 1202)
}


def names() -> Iterable[str]:
    """Every name that `create` knows, in the order of the papers."""
    return tuple(_NETWORKS)


def entry(name: str) -> Entry:
    """The `Entry` called ``name``.

    Raises:
        ValueError: there is none; the message lists near names.
    """
    if name not in _NETWORKS:
        near = difflib.get_close_matches(name, _NETWORKS, n=5, cutoff=0.4) or list(_NETWORKS)
        raise ValueError(f"model: expected the name of a network such as {', '.join(near)}, got {name!r}")
    return _NETWORKS[name]


def create(name: str, *, num_classes: int | None = None, fused: bool = True, **options: Any) -> nn.Module:
    """The network called ``name``.

    Args:
        name: one of `names`.
        num_classes: width of the classifier (the data set's own if None).
        fused: build from `fusedres.nn` blocks; otherwise from their plain PyTorch twins.
        options: the network's own, such as ``in_channels``.

    Raises:
        ValueError: no such network, or an option out of range.
    """
    found = entry(name)
    return found.build(num_classes=num_classes or found.num_classes, fused=fused, **options)
