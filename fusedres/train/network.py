"""The network to be trained, by name, for the data at hand."""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

import fusedres
from fusedres.models import registry
from fusedres.models.sources import torchvision_names, torchvision_source
from fusedres.nn.plain import StochasticBlock

__all__ = ["Network", "build", "drops_blocks", "known_options", "layers"]


class Network(NamedTuple):
    """A model and the channels of the images it takes."""

    model: nn.Module
    channels: int


def build(
    name: str,
    *,
    classes: int,
    channels: int,
    fused: bool = True,
    schedule: str = "auto",
    options: Mapping[str, Any] | None = None,
) -> Network:
    """A network of this library or of torchvision with random weights.

    Args:
        name: one of `fusedres.models.names`, or of torchvision's classification models.
        classes: width of the classifier.
        channels: of the images; a network that is made for colours alone asks for 3 instead.
        fused: fuse it, or leave it plain.
        schedule: of the fused blocks.
        options: the network's own.

    Raises:
        ValueError: no such network, or an option that it does not have.
    """
    chosen = dict(options or {})
    if name in registry.names():
        parameters = inspect.signature(registry.entry(name).build).parameters
        open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        known = [option for option in parameters if option not in ("num_classes", "fused")]
        unknown = [] if open_ended else [option for option in chosen if option not in known]
        if unknown:
            raise ValueError(f"option: expected some of {', '.join(known)} for {name}, got {', '.join(unknown)}")
        if channels != 3 and "in_channels" in parameters:
            chosen["in_channels"] = channels
        else:
            channels = 3
        model = registry.create(name, num_classes=classes, fused=fused, **chosen)
    else:
        model, channels = _torchvision(name, classes, chosen), 3
    if fused:
        fusedres.fuse(model, schedule=schedule)
    return Network(model, channels)


def _torchvision(name: str, classes: int, options: dict[str, Any]) -> nn.Module:
    known = torchvision_names()
    if name not in known:
        names = list(dict.fromkeys((*registry.names(), *known)))
        near = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or names[:5]
        besides = "" if known else "; torchvision, whose networks are known too, is not installed"
        raise ValueError(f"model: expected the name of a network such as {', '.join(near)}, got {name!r}{besides}")
    try:
        return torchvision_source(name).build(num_classes=classes, **options)
    except TypeError as error:
        raise ValueError(f"option: {name}: {error}") from error


def known_options(pairs: Iterable[str]) -> dict[str, Any]:
    """``NAME=VALUE`` pairs; values are numbers, True, False and None where they read as such, text otherwise."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"option: expected NAME=VALUE, got {pair!r}")
        try:
            options[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[name] = text
    return options


def drops_blocks(model: nn.Module) -> bool:
    """Whether a step may leave out blocks, and with them their parameters: stochastic depth."""
    return any(isinstance(module, StochasticBlock) for module in model.modules())


def layers(model: nn.Module) -> int:
    """Convolutions and linear layers, as the papers count depth (projections of shortcuts included)."""
    return sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules())
