"""Networks trained for studies, kept in a folder, where an interrupted training goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from fusedres.cache import slug
from fusedres.train import checkpoint
from fusedres.train.augment import Augment, measure
from fusedres.train.data import open_data
from fusedres.train.distributed import World
from fusedres.train.evaluation import Evaluator
from fusedres.train.logs import Epoch, Logs
from fusedres.train.network import build
from fusedres.train.recipe import PadCrop, Recipe
from fusedres.train.sources import Arrays
from fusedres.train.stopping import Stopping
from fusedres.train.trainer import CHECKPOINT, Diverged, Settings, Trainer, seed_everything

__all__ = ["Images", "Spec", "Trained", "error_of", "images", "named", "total_steps", "trained"]

BATCH = 360
"""Images that are tested at a time."""
DRAW = 1_000_000
"""Between the seeds of two draws: more than anybody takes seeds."""


class Images(NamedTuple):
    """Normalised pixels (N, C, H, W) fp32 and labels (N,)."""

    pixels: torch.Tensor
    labels: torch.Tensor


class Spec(NamedTuple):
    """A network that a study trains.

    Attributes:
        label: names it in tables and pictures.
        make: takes ``classes``, ``channels`` and ``fused``, by name.
        change: of the recipe, for this network.
        draw: 0, 1, ... have weights and an order of images of their own under one seed.
    """

    label: str
    make: Callable[..., nn.Module]
    change: Callable[[Recipe], Recipe] = lambda recipe: recipe
    draw: int = 0


class Trained(NamedTuple):
    """A network after its training, and that; if it ``diverged``, as it was after the last epoch that did not."""

    model: nn.Module
    history: Sequence[Epoch]
    diverged: bool = False


def named(label: str, name: str, change: Callable[[Recipe], Recipe] = lambda recipe: recipe, **options: Any) -> Spec:
    """The `Spec` of a network by name, as `fusedres train --model` takes it, with options of its own."""

    def make(*, classes: int, channels: int, fused: bool) -> nn.Module:
        return build(name, classes=classes, channels=channels, fused=fused, options=options).model

    return Spec(label, make, change)


def images(data: str, mean: Literal["pixel", "channel"], data_dir: Path) -> tuple[Images, Images]:
    """Training and test images of a data set as networks see them when they are tested; ``mean`` is the recipe's."""
    opened = open_data(data, PadCrop(), root=data_dir)
    assert isinstance(opened.train, Arrays)
    assert isinstance(opened.test, Arrays)
    augment = Augment(measure(opened.train, mean), PadCrop())
    train, test = (Images(augment(part.images, None), part.labels) for part in (opened.train, opened.test))
    return train, test


def total_steps(recipe: Recipe, images: int) -> int:
    """Steps of a training on so many images."""
    return recipe.length * (-(-images // recipe.batch) if recipe.unit == "epochs" else 1)


class _Watch(Logs):
    """Tells the steps of a training, and the line of an epoch, to one function."""

    def __init__(self, label: str, total: int, tell: Callable[[str, int], None]) -> None:
        super().__init__(None, "", total, "test")
        self.label, self.tell = label, tell

    def step(self, step: int, epoch: int, lr: float, loss: float, error: float, speed: float, memory: int) -> None:
        self.tell(f"{self.label}: epoch {epoch}, training error {error:.1%}", step)


def trained(
    spec: Spec,
    recipe: Recipe,
    data: str,
    folder: Path,
    *,
    seed: int,
    fused: bool,
    amp: str | None,
    device: torch.device,
    data_dir: Path,
    wish: Stopping,
    tell: Callable[[str, int], None] = lambda words, step: None,
) -> Trained:
    """A network, trained or, where ``folder`` has it, read; a training that was interrupted goes on.

    Args:
        spec: the network.
        recipe: before the network's own changes.
        data: name of a data set in memory.
        folder: holds networks, each in a folder of its own that is named after all that decides on its numbers.
        seed: of weights and of the order of images.
        fused: otherwise plain.
        amp: "bf16", "fp16" or None.
        device: trains it.
        data_dir: where the files of the data set lie.
        wish: stops it.
        tell: takes words about the training and its steps so far.

    Raises:
        Stopped: on a signal, after saving.
    """
    chosen = spec.change(recipe)
    opened = open_data(data, chosen.crop, root=data_dir)
    augment = Augment(measure(opened.train, chosen.mean), chosen.crop, background=opened.background)
    here = World(0, 1, device)
    if spec.draw:
        seed = (seed + spec.draw * DRAW) % 2**63
    seed_everything(seed)
    model = spec.make(classes=len(opened.classes), channels=opened.channels, fused=fused)
    config = {
        "label": spec.label, "recipe": asdict(chosen), "data": data, "seed": seed, "fused": fused, "amp": amp,
        "network": _fingerprint(model),
    }  # fmt: skip
    text = json.dumps(config, sort_keys=True, default=list)
    own = folder / f"{slug(spec.label)}-seed{seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    own.mkdir(parents=True, exist_ok=True)
    settings = Settings(seed=seed, amp={"bf16": torch.bfloat16, "fp16": torch.float16, None: None}[amp])
    test = Evaluator(opened.test, augment, here, batch=BATCH, autocast=lambda: settings.autocast(device))
    trainer = Trainer(model, chosen, opened.train, test, augment, here, settings, config=config, folder=own)
    path = own / CHECKPOINT
    if path.exists():
        trainer.resume(checkpoint.load(path), str(path))
    diverged = False
    try:
        if not trainer.done or len(trainer.history) * len(trainer.order) < trainer.step:
            trainer.run(_Watch(spec.label, trainer.rate.total, tell), wish)
    except Diverged:
        diverged = True
        trainer.model.load_state_dict(checkpoint.load(path)["model"])
    finally:
        test.close()
    return Trained(trainer.model, trainer.history, diverged)


def _fingerprint(model: nn.Module) -> str:
    """Of the names and shapes of a network's tensors."""
    text = repr([(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def error_of(model: nn.Module, images: Images, batch: int = 1000) -> float:
    """The fraction of ``images`` that ``model`` classifies wrongly; it is left in evaluation mode."""
    return float((logits_of(model, images, batch).argmax(1) != images.labels).float().mean())


def logits_of(model: nn.Module, images: Images, batch: int = 1000) -> torch.Tensor:
    """(N, classes) of ``model`` in evaluation mode, on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        parts = [
            model(part.to(device).contiguous(memory_format=torch.channels_last)).cpu()
            for part in images.pixels.split(batch)
        ]
    return torch.cat(parts)
