"""Models by name, by one rule for every command: of a library, or a function or a class in a file."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fusedres import models
from fusedres.arguments import check_packages
from fusedres.models.libraries import of_timm, of_torchvision

Size = tuple[int, int, int]
IMAGENET: Size = (3, 224, 224)
IMAGES = "images"
# By the folder of torchvision that a model stands in; what else is there takes images.
TAKES = {
    "detection": "a list of images, in training with their targets",
    "optical_flow": "pairs of images",
    "video": "clips of images",
}
# The package of a library and the extra that installs it; models of these have the library's name before their own.
PACKAGES = {"torchvision": ("torchvision", "models"), "timm": ("timm", "models"), "hf": ("transformers", "hf")}
# Where a name without a library is looked for, in this order.
UNSAID = ("fusedres", "torchvision", "timm")
# Types of models of transformers that have batch norms, as far as the version at hand has them.
CONVOLUTIONAL = (
    "conditional_detr", "cvt", "d_fine", "dab-detr", "deformable_detr", "detr", "efficientnet", "hgnet_v2", "levit",
    "mobilenet_v1", "mobilenet_v2", "mobilevit", "mobilevitv2", "pp_lcnet", "pp_lcnet_v3", "regnet", "resnet",
    "rt_detr", "rt_detr_resnet", "rt_detr_v2", "swiftformer", "table-transformer", "textnet",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """What builds a model, and what it is given.

    Attributes:
        name: as it was asked for.
        build: makes it with random weights; what a library has takes options, ``num_classes`` the first of them.
        size: (C, H, W) of the images that it is made for.
        library: ``"fusedres"``, ``"torchvision"``, ``"timm"`` or ``"hf"``; None of a file's.
        takes: `IMAGES` where its forward takes one tensor (N, C, H, W), or else what it takes, in words.
    """

    name: str
    build: Callable[..., nn.Module]
    size: Size
    library: str | None = None
    takes: str = IMAGES

    def on_meta(self) -> nn.Module:
        """The model with channels_last parameters on the meta device, in training mode.

        Raises:
            ValueError: what builds it fails, or returns no module.
        """
        try:
            with torch.device("meta"):
                model = self.made()
        except ValueError as error:
            if not isinstance(error.__cause__, (NotImplementedError, RuntimeError)):
                raise
            model = self.made()  # its constructor looks at values
        model.to("meta")
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() == 4:  # Module.to would try those of 3-D convolutions too
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        return model.train()

    def made(self, **options: Any) -> nn.Module:
        """What ``build`` makes of ``options``.

        Raises:
            ValueError: it fails, for which its error is the cause, or returns no module.
        """
        with _failing_as(self.name):
            model = self.build(**options)
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: expected {self.name} to return a torch.nn.Module, got {type(model).__name__}")
        return model

    def of_images(self) -> Source:
        """Itself, for who runs it.

        Raises:
            ValueError: its forward takes something else than one tensor of images.
        """
        if self.takes != IMAGES:
            raise ValueError(
                f"model: expected one that takes a tensor of images, got {self.name}, which takes {self.takes};"
                " explain, bench, train and compile run models of images alone, and doctor says what is fused of others"
            )
        return self


@contextmanager
def _failing_as(name: str) -> Iterator[None]:
    """One line of whatever the code of a model raises."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"model: {name} failed: {in_one_line(error)}") from error


def in_one_line(error: BaseException) -> str:
    """The kind of an error and what it says."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def source(name: str) -> Source:
    """The model called ``name``.

    Args:
        name: ``NAME`` of `fusedres.models`, or else of torchvision, or else of timm; ``torchvision.NAME``, of whichever
            task; ``timm.NAME`` or ``timm/NAME``; ``hf.TYPE``, a type of models of transformers, with random weights and
            the type's default configuration; ``path.py:function`` or ``path.py:Class``, without required arguments.

    Raises:
        ValueError: no such model, file, function or class; the message lists near names. Or the file fails.
        ImportError: the library that ``name`` begins with is not installed.
    """
    if ":" in name or name.endswith(".py"):
        return _from_file(name)
    library, _, bare = (f"timm.{name[5:]}" if name.startswith("timm/") else name).partition(".")
    if library in PACKAGES:
        package, extra = PACKAGES[library]
        check_packages(package, extra=extra)
    for each in (library,) if library in PACKAGES else UNSAID:
        found = FINDERS[each](name, bare if library in PACKAGES else name)
        if found is not None:
            return found
    raise ValueError(_unknown(name, library, bare))


def names(library: str) -> tuple[str, ...]:
    """What `source` knows of ``"fusedres"``, ``"torchvision"`` (of all tasks), ``"timm"`` or ``"hf"``, as it takes it.

    Of ``"hf"``, types with batch norms alone. Nothing of a library that is not installed.

    Raises:
        ValueError: ``library`` is none of these.
    """
    if library not in FINDERS:
        raise ValueError(f"library: expected one of {', '.join(FINDERS)}, got {library!r}")
    return tuple(f"{library}.{bare}" if library in PACKAGES else bare for bare in _bare_names(library))


def namesake(name: str) -> str | None:
    """In words, whose model ``name`` is where both fusedres and torchvision have one; None where it is one's alone."""
    # What is made for images of another size is not torchvision's, and what is torchvision's is one.
    known = models.entry(name) if name in models.names() else None
    own = known is not None and known.library_name is None and known.side == IMAGENET[1]
    if not own or name not in _bare_names("torchvision"):
        return None
    return f"{name}: fusedres's own; torchvision.{name} is torchvision's"


def _bare_names(library: str) -> tuple[str, ...]:
    if library == "fusedres":
        return tuple(models.names())
    if _installed(library):
        if library == "torchvision":
            from torchvision.models import list_models, quantization

            return tuple(sorted(set(list_models()) - set(list_models(module=quantization))))
        if library == "timm":
            import timm

            return tuple(timm.list_models())
        from transformers import CONFIG_MAPPING

        return tuple(one for one in CONVOLUTIONAL if one in CONFIG_MAPPING)
    return ()


def _installed(library: str) -> bool:
    return importlib.util.find_spec(PACKAGES[library][0]) is not None


def _unknown(name: str, library: str, bare: str) -> str:
    """A refusal that lists near names, with the library before them where ``name`` has one."""
    if library in PACKAGES:
        known = _bare_names(library)
        near = [f"{library}.{one}" for one in _near(bare, known, 6) or known[:6]]
    else:
        # Some of each, for timm alone has enough that are near to anything.
        groups = (*map(_bare_names, UNSAID), names("hf"))
        near = list(dict.fromkeys(one for known in groups for one in _near(name, known, 2))) or list(groups[0][:6])
    lacking = [each for each in UNSAID[1:] if not _installed(each)] if library not in PACKAGES else []
    besides = f"; not installed: {', '.join(lacking)}" if lacking else ""
    return f"model: expected a name such as {', '.join(near)}, or path.py:function, got {name!r}{besides}"


def _near(name: str, known: tuple[str, ...], most: int) -> list[str]:
    return difflib.get_close_matches(name, known, n=most, cutoff=0.5)


def _of_fusedres(name: str, bare: str) -> Source | None:
    if bare not in models.names():
        return None
    _, side, _, library_name = models.entry(bare)
    if library_name is not None:
        return replace(source(library_name), name=name)
    return Source(name, partial(models.create, bare, fused=False), (3, side, side), "fusedres")


def _of_torchvision(name: str, bare: str) -> Source | None:
    if not _installed("torchvision"):
        return None
    from torchvision.models import list_models, quantization

    if bare not in list_models():
        return None
    if bare in list_models(module=quantization):
        plain = bare.removeprefix("quantized_")
        raise ValueError(f"model: {name} computes in int8, where nothing is fused; expected torchvision.{plain}")
    build = of_torchvision(bare)
    folder = build.func.__module__.split(".")[2]
    return Source(name, build, IMAGENET, "torchvision", TAKES.get(folder, IMAGES))


def _of_timm(name: str, bare: str) -> Source | None:
    if bare not in _bare_names("timm"):
        return None
    import timm

    size = timm.models.get_pretrained_cfg_value(bare, "input_size") or IMAGENET
    return Source(name, of_timm(bare), size, "timm")


def _of_transformers(name: str, bare: str) -> Source | None:
    import transformers as hf

    if bare not in hf.CONFIG_MAPPING:
        return None

    def configured(**options: Any) -> Any:
        # Types with several classes look for theirs in a list that is None by default.
        config: Any = hf.AutoConfig.for_model(bare, architectures=[], **options)
        within: Any = getattr(config, "backbone_config", None)
        for each in (config, within):
            if getattr(each, "use_pretrained_backbone", False):  # weights that would be downloaded
                each.use_pretrained_backbone = False
        return config

    with _failing_as(name):
        config = configured()
        kinds = (
            (hf.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, hf.AutoModelForImageClassification),
            (hf.MODEL_FOR_BACKBONE_MAPPING, hf.AutoBackbone),
            (hf.MODEL_MAPPING, hf.AutoModel),
        )
        auto = next((auto for known, auto in kinds if type(config) in known), None)
    if auto is None:
        raise ValueError(f"model: {name} is no image classifier, backbone or plain model of transformers")

    def build(*, num_classes: int | None = None, **options: Any) -> nn.Module:
        unknown = [option for option in options if not hasattr(config, option)]
        if unknown:
            raise TypeError(f"its configuration has no {', '.join(unknown)}")
        labels = {} if num_classes is None else {"num_labels": num_classes}
        model: nn.Module = auto.from_config(configured(**labels, **options))
        return model

    side = getattr(config, "image_size", None) or IMAGENET[1]
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    return Source(name, build, (getattr(config, "num_channels", None) or IMAGENET[0], height, width), "hf")


FINDERS = {"fusedres": _of_fusedres, "torchvision": _of_torchvision, "timm": _of_timm, "hf": _of_transformers}


def _from_file(name: str) -> Source:
    text, _, wanted = name.rpartition(":") if ":" in name else (name, "", "")
    path = Path(text)
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"model: expected path.py:function with a file that exists, got {name!r}")
    with _failing_as(name):
        module = _imported(path)
    build = getattr(module, wanted, None) if wanted else None
    if not callable(build):
        own = [key for key, value in vars(module).items() if _builds(value, module)]
        near = difflib.get_close_matches(wanted, own, n=5, cutoff=0.3) or own
        listed = f"such as {', '.join(near)}" if near else "of which it has none"
        raise ValueError(f"model: expected a function or a module class of {path}, {listed}, got {wanted!r}")
    return Source(name, build, IMAGENET)


def _imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"file_of_models_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look for what their annotations name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _builds(value: object, module: ModuleType) -> bool:
    """Whether ``value`` is a function or a module class of ``module`` itself."""
    makes = inspect.isfunction(value) or (inspect.isclass(value) and issubclass(value, nn.Module))
    return makes and getattr(value, "__module__", None) == module.__name__
