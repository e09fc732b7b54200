"""Networks whose classes are torchvision's or timm's, which are imported when one is built."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from fusedres.arguments import check_packages
from fusedres.models.network import check_sizes
from fusedres.swap import fuse

__all__ = ["library_network", "of_timm", "of_torchvision"]


def of_torchvision(name: str) -> partial[nn.Module]:
    """What builds a model of torchvision with random weights, of whichever task; it takes the model's options."""
    from torchvision.models import get_model_builder

    make = get_model_builder(name)
    # The weights of backbones are downloaded where nothing else is said.
    unweighted = {key: None for key in inspect.signature(make).parameters if key in ("weights", "weights_backbone")}
    return partial(make, **unweighted)


def of_timm(name: str) -> partial[nn.Module]:
    """The same of timm."""
    import timm

    return partial(timm.create_model, name)


BUILDERS: dict[str, Callable[[str], Callable[..., nn.Module]]] = {"torchvision": of_torchvision, "timm": of_timm}


def library_network(name: str, *, num_classes: int, fused: bool = True, **options: Any) -> nn.Module:
    """A network of a library, with random weights unless ``options`` say which.

    Args:
        name: ``"torchvision.vgg16"``: the library, and what it calls the network.
        num_classes: width of the classifier.
        fused: fuse it. Parameters, their names and their initial values under one seed are the same.
        options: the library's own.

    Raises:
        ImportError: the library is not installed.
        ValueError, TypeError: an argument is none that the network takes.
    """
    check_sizes(num_classes)
    library, _, bare = name.partition(".")
    check_packages(library, extra="models")
    model = BUILDERS[library](bare)(num_classes=num_classes, **options)
    return fuse(model) if fused else model
