"""What a study is: networks to train, what is measured on them, and what a paper found."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn

from fusedres.studies.training import Images, Spec, Trained, images
from fusedres.train.recipe import Recipe, recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Finding", "Lab", "Point", "Row", "Setting", "Study", "Table", "Verdict", "decided"]


class Row(NamedTuple):
    """One number: ``value`` of a series at ``x``. Several at the same place are random choices of one seed."""

    series: str
    x: float
    value: float


class Point(NamedTuple):
    """All rows at one place: their mean, sample deviation, least value and number, over seeds and choices."""

    series: str
    x: float
    mean: float
    std: float
    best: float
    samples: int


class Table:
    """The rows of every seed, and the points they make.

    Args:
        rows: by seed.
    """

    def __init__(self, rows: Mapping[int, Sequence[Row]]) -> None:
        self.rows = rows
        places: dict[tuple[str, float], list[float]] = {}
        for row in (row for seed in sorted(rows) for row in rows[seed]):
            places.setdefault((row.series, row.x), []).append(row.value)
        self.points = [_point(*place, values) for place, values in places.items()]

    @property
    def series(self) -> list[str]:
        """The names, in the order in which they were measured."""
        return list(dict.fromkeys(point.series for point in self.points))

    def of(self, series: str) -> list[Point]:
        """The points of a series by x, none if it was not measured."""
        return sorted(point for point in self.points if point.series == series)

    def at(self, series: str, x: float) -> Point:
        """The point of a series at ``x``."""
        return next(point for point in self.points if (point.series, point.x) == (series, x))

    def last(self, series: str) -> Point:
        """The point with the largest x: after training, if x counts epochs."""
        return self.of(series)[-1]

    def write(self, path: Path) -> None:
        """Every point as a line of CSV, whole or not at all."""
        temporary = path.with_name(f"{path.name}.partial")
        with temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(Point._fields)
            writer.writerows(self.points)
        os.replace(temporary, path)


def _point(series: str, x: float, values: Sequence[float]) -> Point:
    tensor = torch.tensor(values, dtype=torch.float64)
    spread = float(tensor.std()) if len(values) > 1 else 0.0
    return Point(series, x, float(tensor.mean()), spread, min(values), len(values))


@dataclass(frozen=True)
class Setting:
    """What decides on a study's numbers, but for the seed.

    Attributes:
        full: the paper's setting, on CIFAR-10, in place of a small one on digits.
        epochs: of each training; None is the study's own number, or the recipe's length if ``full``.
        draws: random choices at a place, where a study makes some.
        plain: the networks unfused.
        amp: "bf16", "fp16" or None.
    """

    full: bool = False
    epochs: int | None = None
    draws: int = 10
    plain: bool = False
    amp: str | None = None

    @property
    def data(self) -> str:
        """The name of the data set."""
        return "cifar10" if self.full else "digits"

    def as_json(self) -> dict[str, Any]:
        """What `Record` keeps and compares."""
        return {"data": self.data, **asdict(self)}


class Lab:
    """What a study measures on: the networks of one seed, trained, and the images.

    Args:
        setting: of the study.
        seed: of weights, of the order of images and of every random choice.
        networks: by label.
        recipe: of the networks.
        data_dir: where CIFAR's files lie.
    """

    def __init__(
        self, setting: Setting, seed: int, networks: Mapping[str, Trained], recipe: Recipe, data_dir: Path
    ) -> None:
        self.setting, self.seed, self.networks, self.recipe = setting, seed, networks, recipe
        self.data_dir = data_dir

    @cached_property
    def images(self) -> tuple[Images, Images]:
        """Training and test images as the networks see them."""
        return images(self.setting.data, self.recipe.mean, self.data_dir)

    def model(self, label: str) -> nn.Module:
        """A trained network, in evaluation mode."""
        return self.networks[label].model.eval()

    def generator(self) -> torch.Generator:
        """Of random choices."""
        return torch.Generator().manual_seed(self.seed)

    def curves(self, labels: Iterable[str] | None = None) -> Iterable[Row]:
        """The errors of networks after every epoch, as fractions: series "<label>, training" and "<label>, test"."""
        for label in self.networks if labels is None else labels:
            for row in self.networks[label].history:
                yield Row(f"{label}, training", row.epoch, row.train_error)
                yield Row(f"{label}, test", row.epoch, row.held_out_error)


Verdict = Literal["agrees", "disagrees", "not decided"]


def decided(agrees: bool, disagrees: bool) -> Verdict:
    """The verdict where a run shows what the paper says, or the opposite, or neither."""
    return "agrees" if agrees else "disagrees" if disagrees else "not decided"


class Finding(NamedTuple):
    """What a run found, and whether the paper says so too; "not decided" where the spread is larger than the effect."""

    words: str
    verdict: Verdict


class Study(NamedTuple):
    """An experiment of a paper.

    Attributes:
        name: as in `catalogue.STUDIES`.
        source: the paper and its figure or table.
        paper: what the paper found, in a sentence.
        networks: those that are to be trained.
        measure: rows of one seed.
        found: what the rows of all seeds say.
        draw: the paper's figure again.
        epochs: of a training on digits.
        full_recipe: that of the paper, for CIFAR-10.
    """

    name: str
    source: str
    paper: str
    networks: Callable[[Setting], Sequence[Spec]]
    measure: Callable[[Lab], Iterable[Row]]
    found: Callable[[Table], Finding]
    draw: Callable[[Figure, Table], None]
    epochs: int = 0
    full_recipe: str = "he2015-cifar"

    def recipe(self, setting: Setting) -> Recipe:
        """That of the networks, before a network's own changes."""
        if setting.full:
            whole = recipe(self.full_recipe)
            return whole if setting.epochs is None else whole.lasting(setting.epochs, "epochs")
        return recipe("digits").lasting(setting.epochs or max(self.epochs, 1), "epochs")
