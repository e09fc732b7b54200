"""Models by name, for every command: torchvision's, timm's, the library's own, or a function in a file."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusedres import models

Size = tuple[int, int, int]
IMAGENET: Size = (3, 224, 224)


@dataclass(frozen=True)
class Source:
    """What builds a model, and the (C, H, W) of the images that it takes."""

    name: str
    build: Callable[..., nn.Module]
    size: Size

    def on_meta(self) -> nn.Module:
        """The model with channels_last parameters on the meta device, in training mode.

        Raises:
            ValueError: what builds it fails, or returns no module.
        """
        with _failing_as(self.name):
            try:
                with torch.device("meta"):
                    model = self.build()
            except (NotImplementedError, RuntimeError):  # its constructor looks at values
                model = self.build()
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: expected {self.name} to return a torch.nn.Module, got {type(model).__name__}")
        return model.to("meta").to(memory_format=torch.channels_last).train()


@contextmanager
def _failing_as(name: str) -> Iterator[None]:
    """One line of whatever the code of a model raises."""
    try:
        yield
    except Exception as error:
        message = " ".join(str(error).split())
        raise ValueError(f"model: {name} failed: {type(error).__name__}: {message}") from error


def source(name: str) -> Source:
    """The model called ``name``.

    Args:
        name: of `fusedres.models`, of torchvision, of timm (``timm.`` or ``timm/`` before it if torchvision has one of
            that name), or ``path.py:function``, a function without arguments that returns a model.

    Raises:
        ValueError: no such model, file or function; the message lists near names. Or the file fails.
    """
    if ":" in name:
        return _from_file(name)
    found = library_source(name)
    if found is None:
        known = dict.fromkeys((*models.names(), *torchvision_names(), *timm_names()))
        near = difflib.get_close_matches(name, known, n=6, cutoff=0.5) or ["resnet50", *models.names()]
        raise ValueError(f"model: expected a name such as {', '.join(near)}, or path.py:function, got {name!r}")
    return found


def library_source(name: str) -> Source | None:
    """The same of a library's name; None where there is none. What builds it takes options, ``num_classes`` first."""
    if name in models.names():
        entry = models.registry.entry(name)
        return Source(name, partial(models.create, name, fused=False), (3, entry.side, entry.side))
    if name in torchvision_names():
        return torchvision_source(name)
    bare = timm_name(name) or name
    if bare not in timm_names():
        return None
    import timm

    size = timm.models.get_pretrained_cfg_value(bare, "input_size") or IMAGENET
    return Source(name, partial(timm.create_model, bare), size)


def torchvision_source(name: str) -> Source:
    """A classification model of torchvision, which is imported where it is built."""

    def build(**options: Any) -> nn.Module:
        from torchvision.models import get_model

        model: nn.Module = get_model(name, weights=None, **options)
        return model

    return Source(name, build, IMAGENET)


def timm_name(name: str) -> str | None:
    """NAME of ``timm.NAME`` and of ``timm/NAME``; None of other names."""
    library, bare = name[:5], name[5:]
    return bare if library in ("timm.", "timm/") else None


def torchvision_names() -> tuple[str, ...]:
    """torchvision's classification models; none where it is not installed."""
    try:
        import torchvision
    except ImportError:
        return ()
    return tuple(torchvision.models.list_models(module=torchvision.models))


def timm_names() -> tuple[str, ...]:
    """timm's models; none where it is not installed."""
    try:
        import timm
    except ImportError:
        return ()
    return tuple(timm.list_models())


def _from_file(name: str) -> Source:
    text, _, function = name.rpartition(":")
    path = Path(text)
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"model: expected path.py:function with a file that exists, got {name!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _failing_as(name):
        spec.loader.exec_module(module)
    build = getattr(module, function, None)
    if not callable(build):
        own = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        near = difflib.get_close_matches(function, own, n=5, cutoff=0.3) or own
        raise ValueError(f"model: expected a function of {path} such as {', '.join(near) or 'none'}, got {function!r}")
    return Source(name, build, IMAGENET)
