"""The network to be trained, by name, for the data at hand."""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

import fusedres
from fusedres.models import registry
from fusedres.models.sources import Source, in_one_line, source
from fusedres.nn.plain import StochasticBlock
from fusedres.traffic.tensors import first_tensor

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
    """A network with random weights.

    Args:
        name: by the rule of `models.sources.source`.
        classes: width of the classifier.
        channels: of the images; a network that is made for colours alone asks for 3 instead.
        fused: fuse it, or leave it plain.
        schedule: of the fused blocks.
        options: the network's own.

    Raises:
        ValueError: no such network, one that does not classify images, or an option that it does not have.
        ImportError: the library it is of is not installed.
    """
    chosen = dict(options or {})
    found = source(name).of_images()
    if found.library == "fusedres":
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
        model, channels = _of_others(found, classes, chosen), 3
    if fused:
        fusedres.fuse(model, schedule=schedule)
    return Network(model, channels)


def _of_others(found: Source, classes: int, options: dict[str, Any]) -> nn.Module:
    parameters = inspect.signature(found.build).parameters.values()
    if any(parameter.name == "num_classes" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        options = {"num_classes": classes, **options}
    try:
        model = found.made(**options)
    except ValueError as error:
        if options and isinstance(error.__cause__, TypeError):
            raise ValueError(f"option: {found.name}: {error.__cause__}") from error
        raise
    given = _output_size(model, found)
    if given != (classes,):
        raise ValueError(f"model: expected one that gives each image {classes} logits, got {given} from {found.name}")
    return model


def _output_size(model: nn.Module, found: Source) -> tuple[int, ...]:
    """Of the first output for one image, without the batch; on the CPU if the forward looks at values."""
    refusal = None
    for device in ("meta", "cpu"):
        twin = copy.deepcopy(model).to(device).eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                output = twin(torch.zeros(2, *found.size, device=device))
        except Exception as error:
            refusal = refusal or error
            continue
        return tuple(first_tensor(output).shape[1:])
    assert refusal is not None
    message = f"expected one that takes a tensor of images, and the forward of {found.name} fails"
    raise ValueError(f"model: {message}: {in_one_line(refusal)}") from refusal


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
