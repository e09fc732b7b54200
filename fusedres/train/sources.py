"""Labelled images: where they lie and how those of a batch are fetched."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, overload

import torch

from fusedres.train.recipe import ScaleCrop

__all__ = ["Arrays", "Data", "DataError", "Folder", "Source", "View", "split"]


class DataError(ValueError):
    """Files of a data set are missing or broken; the message names them."""


class Source(Protocol):
    """Labelled images. Labels are (N,) int64."""

    labels: torch.Tensor

    def fetch(self, indices: torch.Tensor, draws: torch.Tensor | None) -> torch.Tensor:
        """Images (len(indices), C, H, W), uint8 or fp32; ``draws`` (len(indices), D) in (0, 1) choose crops."""


class Data(NamedTuple):
    """A data set. ``background`` is the pixel value that surrounds its images, None where that is unknown."""

    name: str
    classes: tuple[str, ...]
    channels: int
    train: Source
    test: Source
    validation: Source | None = None
    background: float | None = None


class Arrays:
    """Images in memory, all of one size."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images = images
        self.labels = labels

    def fetch(self, indices: torch.Tensor, draws: torch.Tensor | None) -> torch.Tensor:
        return self.images[indices]


class Files(Sequence[Path]):
    """Paths in one piece of memory: a million objects would be copied into every worker as their counts change."""

    def __init__(self, paths: Iterable[Path]) -> None:
        names = [os.fsencode(path) for path in paths]
        self.names = b"".join(names)
        self.ends = torch.tensor([0, *map(len, names)]).cumsum(0)

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> Path: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Path]: ...

    def __getitem__(self, index: int | slice) -> Path | Sequence[Path]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, end = self.ends[range(len(self))[index] :][:2].tolist()
        return Path(os.fsdecode(self.names[start:end]))


class View(NamedTuple):
    """What is seen of an image at test time: "single" crop, "ten" crops, or the "whole" image at one scale."""

    kind: str
    side: int
    size: int


class Folder:
    """Image files, decoded when they are asked for.

    Under ``draws`` an image's shorter side becomes one of ``crop.sides`` and a random square of ``crop.size`` is cut
    out, by columns 0 to 2; without them the image is seen through ``view``, where ten crops (of its central square the
    four corners and the centre, and their mirror images) come as (10, C, H, W) and a whole image with its mirror image
    as (2, C, H, W).
    """

    def __init__(self, files: Iterable[Path], labels: torch.Tensor, crop: ScaleCrop, view: View | None = None) -> None:
        self.files = files if isinstance(files, Files) else Files(files)
        self.labels = labels
        self.crop = crop
        self.view = view or View("single", crop.test_side, crop.size)

    def fetch(self, indices: torch.Tensor, draws: torch.Tensor | None) -> torch.Tensor:
        rows: Sequence[torch.Tensor | None] = [None] * len(indices) if draws is None else list(draws)
        return torch.stack([self._one(int(index), row) for index, row in zip(indices, rows, strict=True)])

    def _one(self, index: int, draws: torch.Tensor | None) -> torch.Tensor:
        from torchvision.transforms import functional as T

        image = read_image(self.files[index])
        if draws is not None:
            low, high = self.crop.sides
            size = self.crop.size
            image = T.resize(image, low + int(draws[0] * (high - low + 1)))
            top, left = (int(draw * (side - size + 1)) for draw, side in zip(draws[1:3], image.size[::-1], strict=True))
            return T.pil_to_tensor(T.crop(image, top, left, size, size))
        image = T.resize(image, self.view.side)
        if self.view.kind == "ten":
            square = T.center_crop(image, self.view.side)
            return torch.stack([T.pil_to_tensor(crop) for crop in T.ten_crop(square, self.view.size)])
        if self.view.kind == "whole":
            whole = T.pil_to_tensor(image)
            return torch.stack([whole, whole.flip(-1)])
        return T.pil_to_tensor(T.center_crop(image, self.view.size))

    def with_view(self, view: View) -> Folder:
        """The same images through another view."""
        return Folder(self.files, self.labels, self.crop, view)


def read_image(path: Path):  # type: ignore[no-untyped-def]  # PIL.Image.Image
    """The image as RGB; `DataError` with the path where it can not be decoded."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"data: the image {path} can not be read: {error}") from error


def split(source: Source, held_out: int, part: Callable[[torch.Tensor], Source]) -> tuple[Source, Source]:
    """Two disjoint sources: all but ``held_out`` images, and those. By a fixed rule, the same under every seed.

    Raises:
        ValueError: nothing would be left on one side.
    """
    count = len(source.labels)
    if not 1 <= held_out < count:
        raise ValueError(f"validation must be between 1 and {count - 1} of the {count} training images, got {held_out}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return part(order[:-held_out].sort().values), part(order[-held_out:].sort().values)
