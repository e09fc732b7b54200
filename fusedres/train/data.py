"""The data sets by name."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from pathlib import Path

import torch

from fusedres.train import mnist
from fusedres.train.cifar import CIFAR10, CIFAR100, load_cifar
from fusedres.train.recipe import PadCrop, ScaleCrop
from fusedres.train.sources import Arrays, Data, DataError, Files, Folder, Source, split

__all__ = ["KINDS", "open_data"]

KINDS = ("cifar10", "cifar100", "digits", "mnist5k", "imagefolder:PATH")
FOLDER = "imagefolder:"
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})
DIGIT_SIDE = 8
SIDES = {"cifar10": 32, "cifar100": 32, "mnist5k": mnist.SIDE}


def open_data(
    name: str,
    crop: PadCrop | ScaleCrop,
    *,
    root: Path = Path("data"),
    validation: int = 0,
    px: int | None = None,
    download: bool = True,
) -> Data:
    """The data set called ``name``, one of `KINDS`, its images cut by ``crop``.

    Args:
        name: ``imagefolder:PATH`` expects ``PATH/train/CLASS/*`` and ``PATH/val/CLASS/*`` (or ``test``).
        crop: the recipe's, `ScaleCrop` for image folders and `PadCrop` for images of one size.
        root: where CIFAR's files lie.
        validation: training images to hold out, by a fixed rule.
        px: height and width of digits (8 by default) and of crops from image folders (the recipe's), for which
            all scales of the recipe follow in proportion.
        download: CIFAR's files where they are missing.

    Raises:
        DataError: files are missing or broken.
        ValueError: an unknown name, or a crop or size that does not go with the data.
    """
    if name.startswith(FOLDER):
        if not isinstance(crop, ScaleCrop):
            raise ValueError(f"recipe: expected one that scales its images (such as he2015-imagenet) for {name}")
        data = _folder(name, Path(name.removeprefix(FOLDER)), crop if px is None else _scaled(crop, px))
    elif name not in KINDS:
        raise ValueError(f"data: expected one of {', '.join(KINDS)}, got {name!r}")
    elif not isinstance(crop, PadCrop):
        raise ValueError(f"recipe: expected one for images of one size (such as he2015-cifar) for {name}")
    elif name == "digits":
        data = _digits(px or DIGIT_SIDE)
    elif px not in (None, SIDES[name]):
        raise ValueError(f"px: the images of {name} are {SIDES[name]} pixels wide, got {px}")
    elif name == "mnist5k":
        data = Data(name, tuple(map(str, range(10))), 1, *mnist.load_mnist5k(), background=0.0)
    else:
        form = CIFAR10 if name == "cifar10" else CIFAR100
        train, test = load_cifar(form, root, download=download)
        data = Data(name, tuple(map(str, range(form.classes))), 3, train, test)
    if validation:
        train_part, held_out = split(data.train, validation, lambda indices: _subset(data.train, indices))
        data = data._replace(train=train_part, validation=held_out)
    return data


def _subset(source: Source, indices: torch.Tensor) -> Source:
    part = copy.copy(source)
    part.labels = source.labels[indices]
    if isinstance(part, Arrays):
        part.images = part.images[indices]
    elif isinstance(part, Folder):
        part.files = Files(part.files[int(index)] for index in indices)
    return part


def _digits(px: int) -> Data:
    from fusedres.train.digits import load_digits

    digits = load_digits(px)
    return Data(
        "digits",
        tuple(map(str, range(10))),
        1,
        Arrays(digits.train_images, digits.train_labels),
        Arrays(digits.test_images, digits.test_labels),
        background=digits.background,
    )


def _scaled(crop: ScaleCrop, size: int) -> ScaleCrop:
    def of(side: int) -> int:
        return max(size, round(side * size / crop.size))

    low, high = crop.sides
    return replace(
        crop,
        size=size,
        sides=(of(low), of(high)),
        test_side=of(crop.test_side),
        test_sides=tuple(of(side) for side in crop.test_sides),
    )


def _folder(name: str, path: Path, crop: ScaleCrop) -> Data:
    expected = f"expected {path}/train/CLASS/*.jpg and {path}/val/CLASS/*.jpg (or {path}/test/...)"
    folders = [path / "train", next((path / part for part in ("val", "test") if (path / part).is_dir()), path / "val")]
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"data: there is no folder {folder}; {expected}")
    classes, other = (sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) for folder in folders)
    if not classes:
        raise DataError(f"data: {folders[0]} holds no folders of classes; {expected}")
    if classes != other:
        odd = sorted(set(classes) ^ set(other))
        raise DataError(f"data: {folders[0]} and {folders[1]} differ in the classes {', '.join(odd[:10])}")
    train, test = (_scan(folder, classes, crop) for folder in folders)
    return Data(name, tuple(classes), 3, train, test)


def _scan(folder: Path, classes: list[str], crop: ScaleCrop) -> Folder:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(
            Path(parent, file)
            for parent, _, names in os.walk(folder / name, followlinks=True)
            for file in names
            if os.path.splitext(file)[1].lower() in SUFFIXES
        )
        if not found:
            raise DataError(f"data: {folder / name} holds no images ({', '.join(sorted(SUFFIXES))})")
        files += found
        labels += [label] * len(found)
    return Folder(files, torch.tensor(labels), crop)
