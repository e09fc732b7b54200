"""Networks trained on digits, for the studies that need trained ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from fusedres.train.augment import Augment, measure
from fusedres.train.data import open_data
from fusedres.train.distributed import World
from fusedres.train.evaluation import Evaluator
from fusedres.train.logs import Logs
from fusedres.train.recipe import PadCrop, recipe
from fusedres.train.sources import Arrays
from fusedres.train.stopping import Stopping
from fusedres.train.trainer import Settings, Trainer

__all__ = ["Images", "digits", "error_of", "train_on_digits"]


class Images(NamedTuple):
    """Normalised pixels (N, 1, H, W) fp32 and labels (N,)."""

    pixels: torch.Tensor
    labels: torch.Tensor


def digits() -> tuple[Images, Images]:
    """Training and test digits as the network sees them."""
    data = open_data("digits", PadCrop())
    assert isinstance(data.train, Arrays)
    assert isinstance(data.test, Arrays)
    augment = Augment(measure(data.train, "channel"), PadCrop())
    train, test = (Images(augment(part.images, None), part.labels) for part in (data.train, data.test))
    return train, test


def train_on_digits(model: nn.Module, *, epochs: int, seed: int) -> tuple[Images, Images]:
    """Train ``model`` by the digits' recipe, in place, and return training and test images."""
    chosen = recipe("digits").lasting(epochs, "epochs")
    data = open_data("digits", chosen.crop)
    augment = Augment(measure(data.train, chosen.mean), chosen.crop, background=data.background)
    here = World(0, 1, torch.device("cpu"))
    trainer = Trainer(
        model, chosen, data.train, Evaluator(data.test, augment, here, batch=360), augment, here, Settings(seed=seed),
        config={}, folder=None,
    )  # fmt: skip
    trainer.run(Logs(None, "", trainer.rate.total, "test"), Stopping())
    return digits()


def error_of(model: nn.Module, images: Images) -> float:
    """The fraction of ``images`` that ``model`` classifies wrongly."""
    model.eval()
    with torch.no_grad():
        pixels = images.pixels.contiguous(memory_format=torch.channels_last)
        return float((model(pixels).argmax(1) != images.labels).float().mean())
