"""Testing: single crops, ten crops, and whole images at several scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from fusedres.traffic.tensors import first_tensor
from fusedres.train.augment import Augment
from fusedres.train.distributed import World
from fusedres.train.loading import Order, close, loader
from fusedres.train.sources import DataError, Folder, Source, View
from fusedres.train.stopping import Stopping

__all__ = ["KINDS", "Evaluator", "Result", "Scores", "mean_of_scores", "views"]

KINDS = ("single", "ten-crop", "multi-scale")


class Result(NamedTuple):
    """Mean cross entropy, and the fractions of images whose class is not first, and not among the first five."""

    loss: float
    error: float
    error5: float


class Scores(NamedTuple):
    """Logarithms of probabilities (N, classes), and labels (N,)."""

    logs: torch.Tensor
    labels: torch.Tensor


def views(source: Source, kind: str) -> tuple[View | None, ...]:
    """The views over which ``kind``, one of `KINDS`, averages.

    "ten-crop" is the standard test of Krizhevsky 2012 (sections 2 and 4.1): corners and centre of the central square,
    mirrored too. "multi-scale" is that of He 2015, section 3.4: the network is run over the whole image at every scale,
    and its global average pooling makes it fully convolutional. That mirror images take part, and that the scores which
    are averaged are probabilities, He does not state; both are so in the paper that is followed there (Simonyan and
    Zisserman, arXiv:1409.1556, sections 3.2 and 4.2).

    Raises:
        ValueError: no such kind, or one that the papers do not use on images in memory.
    """
    if kind not in KINDS:
        raise ValueError(f"test: expected one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "single":
        return (None,)
    if not isinstance(source, Folder):
        raise ValueError(f"test: {kind} needs an image folder; small images are tested on a single view, as in papers")
    crop = source.crop
    if kind == "ten-crop":
        return (View("ten", crop.test_side, crop.size),)
    return tuple(View("whole", side, side) for side in crop.test_sides)


class Evaluator:
    """Measures a model on a source, all ranks together. The loaders, and their workers, live as long as it does."""

    def __init__(
        self,
        source: Source,
        augment: Augment,
        world: World,
        *,
        batch: int,
        workers: int = 0,
        kind: str = "single",
        channels_last: bool = True,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.source, self.augment, self.world = source, augment.to(world.device), world
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.autocast = autocast
        self.batch, self.workers = batch, workers
        self.views = views(source, kind)
        self.loaders = [self._loader(view) for view in self.views]

    def _loader(self, view: View | None) -> Any:
        source, size = self.source, self.batch
        if view is not None:
            assert isinstance(source, Folder)
            source = source.with_view(view)
            # Whole images differ in shape, and ten crops are ten images.
            size = self.world.size * (1 if view.kind == "whole" else max(1, self.batch // self.world.size // 10))
        order = Order(len(source.labels), size, seed=None, rank=self.world.rank, ranks=self.world.size)
        pin = self.world.device.type == "cuda"
        return loader(source, order, self.augment, workers=self.workers, here=False, pin=pin)

    def __call__(self, model: nn.Module, wish: Stopping | None = None) -> Result | None:
        """The `Result` of ``model``, which is left in the mode it was in; None if ``wish`` stopped any rank."""
        scores = self.scores(model, wish)
        return None if scores is None else self.result(scores)

    def scores(self, model: nn.Module, wish: Stopping | None = None) -> Scores | None:
        """What ``model`` says of the images of this rank, over all views; None if ``wish`` stopped any rank."""
        wish = wish or Stopping()
        training = model.training
        model.eval()
        self.world.share_buffers(model)
        try:
            with torch.no_grad():
                scores = [self._scores(model, batches, wish) for batches in self.loaders]
        finally:
            model.train(training)
        if self.world.rows(torch.tensor([float(wish.requested)], device=self.world.device)).any():
            return None
        return mean_of_scores(scores)

    def result(self, scores: Scores) -> Result:
        """The `Result` of the ``scores`` of all ranks together."""
        logs, labels = scores
        first5 = logs.topk(min(5, logs.shape[1]), 1).indices
        hits = first5 == labels[:, None]
        sums = torch.stack([
            -logs.gather(1, labels[:, None]).double().sum(),
            hits[:, 0].sum().double(),
            hits.sum().double(),
            torch.tensor(float(len(labels)), dtype=torch.float64),
        ])  # fmt: skip
        loss, first, five, count = self.world.rows(sums.to(self.world.device)).sum(0).tolist()
        return Result(loss / count, 1 - first / count, 1 - five / count)

    def close(self) -> None:
        """End the processes that read images."""
        for batches in self.loaders:
            close(batches)

    def _scores(self, model: nn.Module, batches: Any, wish: Stopping) -> Scores:
        """Those of the images of this rank, over one view."""
        logs, labels = [], []
        for loaded in batches:
            if isinstance(loaded, DataError):
                raise loaded
            if wish.requested:
                break
            count = len(loaded.labels)
            if count == 0:
                continue
            images = loaded.images.to(self.world.device, non_blocking=True)
            images = self.augment(images, None).contiguous(memory_format=self.format)
            with self.autocast():
                logits = first_tensor(model(images))
            by_view = logits.float().log_softmax(1).view(count, -1, logits.shape[1])
            logs.append(_mean_of_probabilities(list(by_view.unbind(1))).cpu())
            labels.append(loaded.labels)
        if not logs:
            return Scores(torch.empty(0, 1), torch.empty(0, dtype=torch.int64))
        return Scores(torch.cat(logs), torch.cat(labels))


def mean_of_scores(scores: Sequence[Scores]) -> Scores:
    """The mean of the probabilities that several views or models give the same images."""
    return Scores(_mean_of_probabilities([one.logs for one in scores]), scores[0].labels)


def _mean_of_probabilities(logs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of logarithms of probabilities, as one."""
    if len(logs) == 1:
        return logs[0]
    return torch.stack(list(logs)).logsumexp(0) - math.log(len(logs))
