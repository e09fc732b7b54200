"""Batches in an order that is a function of seed and epoch, read by any number of worker processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fusedres.runtime.torch_private import end_workers
from fusedres.train.augment import Augment
from fusedres.train.draws import uniform
from fusedres.train.sources import DataError, Source

__all__ = ["Batch", "Loaded", "Order", "close", "loader"]


class Batch(NamedTuple):
    """Which images; ``epoch`` None at test time."""

    indices: torch.Tensor
    epoch: int | None


class Loaded(NamedTuple):
    """A batch with its images; ``draws`` is None at test time and where the images are augmented already."""

    images: torch.Tensor
    labels: torch.Tensor
    draws: torch.Tensor | None


class Order(Sampler[Batch]):
    """The batches of an epoch that one rank of several sees, from the ``start``-th on.

    In training the images are shuffled, every batch has ``size`` images over all ranks, and what does not fill one is
    left out; a batch holds the same images however many ranks share it. At test time (``seed`` None) nothing is
    shuffled or left out.
    """

    def __init__(self, count: int, size: int, *, seed: int | None, rank: int = 0, ranks: int = 1) -> None:
        self.count, self.size, self.seed, self.rank, self.ranks = count, size, seed, rank, ranks
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return self.count // self.size if self.seed is not None else -(-self.count // self.size)

    def __iter__(self) -> Iterator[Batch]:
        if self.seed is None:
            for part in torch.arange(self.count).split(self.size):
                yield Batch(part[self.rank :: self.ranks], None)
            return
        # Sorting random numbers shuffles.
        order = uniform(self.seed, self.epoch, torch.arange(self.count) - self.count - 1, 1)[:, 0].argsort(stable=True)
        for i_batch in range(self.start, len(self)):
            part = order[i_batch * self.size : (i_batch + 1) * self.size]
            yield Batch(part[self.rank :: self.ranks], self.epoch)


class _Images(Dataset[Any]):
    def __init__(self, source: Source, augment: Augment, seed: int, here: bool) -> None:
        self.source, self.augment, self.seed, self.here = source, augment, seed, here

    def __getitem__(self, batch: Batch) -> Loaded | DataError:
        draws = None
        if batch.epoch is not None:
            draws = uniform(self.seed, batch.epoch, batch.indices, self.augment.columns)
        try:
            images = self.source.fetch(batch.indices, draws)
        except DataError as error:
            # Returned, since a worker process would bury the message in a traceback.
            return error
        labels = self.source.labels[batch.indices]
        return Loaded(self.augment(images, draws), labels, None) if self.here else Loaded(images, labels, draws)


def loader(
    source: Source, order: Order, augment: Augment, *, workers: int, here: bool, pin: bool = False
) -> DataLoader[Any]:
    """A loader of `Loaded` batches, or of the `DataError` met instead.

    Args:
        source, order, augment: what to read, in which batches, and what to do with them.
        workers: processes that read; 0 reads in this one.
        here: augment where the images are read; otherwise images come as they are, with their draws.
        pin: into page-locked memory, for copies to a GPU.
    """
    return DataLoader(
        _Images(source, augment, order.seed or 0, here),
        sampler=order,
        batch_size=None,
        num_workers=workers,
        collate_fn=_dense if pin else _as_it_is,
        pin_memory=pin,
        persistent_workers=workers > 0,
        worker_init_fn=_ignore_signals,
        # Its own, since a loader takes a number from the process's generator whenever it starts.
        generator=torch.Generator(),
    )


def _as_it_is(loaded: Any) -> Any:
    return loaded


def _dense(loaded: Any) -> Any:
    """A batch whose every number has a place of its own. What was expanded, or overlaps, can not be pinned."""
    if not isinstance(loaded, Loaded):
        return loaded
    images, labels, draws = loaded
    return Loaded(_filling(images), _filling(labels), None if draws is None else _filling(draws))


def _filling(tensor: torch.Tensor) -> torch.Tensor:
    # A copy keeps the strides of a tensor that fills its memory, and of no other.
    fills = torch.empty_like(tensor, device="meta").stride() == tensor.stride()
    return tensor if fills else tensor.clone()


def _ignore_signals(_: int) -> None:
    # They reach all processes of a terminal or a job, but the main one decides: it must not lose its workers, whose
    # end torch reports by an exception in the middle of anything, a checkpoint being written included.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def close(batches: DataLoader[Any]) -> None:
    """End the workers of a loader, which would otherwise live as long as any reference to it."""
    end_workers(batches)
