"""The training loop: steps, epochs, checkpoints, and going on where a training stopped."""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedres.runtime.graphed import Graphed, graphed
from fusedres.traffic.tensors import first_tensor
from fusedres.train import checkpoint, memory
from fusedres.train.augment import Augment
from fusedres.train.distributed import World
from fusedres.train.evaluation import Result
from fusedres.train.loading import Loaded, Order, close, loader
from fusedres.train.logs import Epoch, Logs
from fusedres.train.network import drops_blocks, layers
from fusedres.train.rate import LearningRate
from fusedres.train.recipe import Recipe
from fusedres.train.sources import DataError, Source
from fusedres.train.stopping import Stopped, Stopping

__all__ = ["CHECKPOINT", "Diverged", "Settings", "Trainer", "seed_everything"]

CHECKPOINT = "checkpoint.pt"
# Steps between looks at the loss, each of which waits for the GPU.
LOOK_EVERY = 10
NEVER = float(2**53)


class Diverged(RuntimeError):
    """The loss or the weights are not finite; the last checkpoint is from before."""


class Settings(NamedTuple):
    """How a training computes. ``amp`` None computes in fp32; ``workers`` read images besides this process; ``graph``:
    steps are captured as a CUDA graph."""

    seed: int = 0
    amp: torch.dtype | None = None
    channels_last: bool = True
    workers: int = 0
    augment_on_device: bool = False
    graph: bool = False

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """What a forward pass runs in."""
        return nullcontext() if self.amp is None else torch.autocast(device.type, dtype=self.amp)


def _check_graph(model: nn.Module, world: World) -> None:
    if world.device.type != "cuda":
        raise ValueError(f"graph: expected a GPU, which has graphs, got {world.device}")
    if world.size > 1:
        raise ValueError(f"graph: expected one process, got {world.size}")
    if drops_blocks(model):
        raise ValueError("graph: expected a network whose blocks all run, got one that drops some at random")


def seed_everything(seed: int) -> None:
    """The generators of Python, NumPy (if it is in use) and torch."""
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


class Trainer:
    """Trains ``model`` on ``source`` as ``recipe`` says.

    Args:
        model: on the CPU or the device; it is moved.
        recipe: with the batch of all ranks together.
        source: training images.
        held_out: measures after every epoch, and gives None if it was stopped; the error tells plateaus if
            ``validation``, else the training error does.
        augment: what is done to training images.
        world: this process among others.
        settings: how it computes.
        config: what a resumed training must agree in.
        folder: takes the checkpoints; None keeps none.

    Raises:
        ValueError: the batch is larger than the data, or not the same on every rank; or a graph is asked for of what
            can not be captured.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        source: Source,
        held_out: Callable[[nn.Module, Stopping], Result | None],
        augment: Augment,
        world: World,
        settings: Settings,
        *,
        config: dict[str, Any],
        folder: Path | None,
        validation: bool = False,
    ) -> None:
        count = len(source.labels)
        if not 1 <= recipe.batch <= count:
            raise ValueError(f"batch must be between 1 and the {count} training images, got {recipe.batch}")
        if recipe.batch % world.size:
            raise ValueError(f"batch: expected a multiple of the {world.size} processes, got {recipe.batch}")
        if settings.graph:
            _check_graph(model, world)
        self.recipe, self.world, self.settings = recipe, world, settings
        self.format = torch.channels_last if settings.channels_last else torch.contiguous_format
        self.model = model.to(world.device).to(memory_format=self.format)
        self.parallel = world.wrap(self.model, unused=drops_blocks(model))
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=torch.tensor(recipe.lr, device=world.device) if settings.graph else recipe.lr,
            momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov,
            fused=settings.graph or None,
        )  # fmt: skip
        self.graphs: dict[torch.Size, Graphed[tuple[Tensor, Tensor]]] = {}
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=settings.amp is torch.float16)
        self.order = Order(count, recipe.batch, seed=settings.seed, rank=world.rank, ranks=world.size)
        self.rate = LearningRate(recipe, self.optimizer, len(self.order), layers(model))
        self.held_out, self.validation = held_out, validation
        self.augment = augment.to(world.device)
        self.batches = loader(
            source, self.order, augment, workers=settings.workers,
            here=not settings.augment_on_device, pin=world.device.type == "cuda",
        )  # fmt: skip
        self.config, self.folder = config, folder
        self.step = 0
        self.history: list[Epoch] = []
        self.best = math.inf
        self._clear()
        if world.rank:
            # Weights come from rank 0; what is drawn in training (dropout) is to differ.
            torch.manual_seed(settings.seed + 7919 * world.rank)

    def _clear(self) -> None:
        """Start the sums of an epoch: loss, wrong answers, images, and the first step with a bad loss."""
        self.sums = torch.tensor([0.0, 0.0, 0.0, NEVER], dtype=torch.float64, device=self.world.device)
        # The sums, over all ranks, of the last look.
        self.seen = (0.0, 0.0, 0.0)
        self.elapsed = 0.0

    @property
    def done(self) -> bool:
        """Whether all steps are made."""
        return self.step >= self.rate.total

    def run(self, logs: Logs, wish: Stopping) -> None:
        """All steps that are left.

        Raises:
            Stopped: on a signal, after saving.
            Diverged: the loss is not finite; nothing is saved.
            memory.DoesNotFit, DataError: likewise.
        """
        if self.step == 0:
            self.save()
        try:
            total = tuple(self.world.rows(self.sums).sum(0).tolist())
            if total[2] and (self.done or self.step % len(self.order) == 0):
                # It was stopped between the last step of an epoch and the measurement after it.
                self._end_epoch(logs, wish, total, self.elapsed)
            while not self.done:
                self._epoch(logs, wish)
        finally:
            close(self.batches)

    def _epoch(self, logs: Logs, wish: Stopping) -> None:
        per_epoch = len(self.order)
        self.order.epoch, self.order.start = divmod(self.step, per_epoch)
        self.model.train()
        batches = iter(self.batches)
        started = time.perf_counter() - self.elapsed
        last_look = (time.perf_counter(), self.seen[2])
        while True:
            self._step(next(batches))
            over = self.step % per_epoch == 0 or self.done
            if self.step % LOOK_EVERY == 0 or over or (wish.requested and self.world.size == 1):
                total, recent, stop = self._look(wish)
                now = time.perf_counter()
                speed = (total[2] - last_look[1]) / max(now - last_look[0], 1e-9)
                last_look = (now, total[2])
                lr = float(self.optimizer.param_groups[0]["lr"])
                logs.step(self.step, self.order.epoch + 1, lr, *recent, speed, memory.peak(self.world.device))
                if stop and not over:
                    self.elapsed = now - started
                    self._stop(stop)
            if over:
                break
        self._end_epoch(logs, wish, total, time.perf_counter() - started)

    def _step(self, loaded: Loaded | DataError) -> None:
        if isinstance(loaded, DataError):
            raise loaded
        device = self.world.device
        images = loaded.images.to(device, non_blocking=True)
        labels = loaded.labels.to(device, non_blocking=True)
        if loaded.draws is not None:
            images = self.augment(images, loaded.draws.to(device, non_blocking=True))
        images = images.contiguous(memory_format=self.format)
        self.rate.before(self.step)
        loss, logits = (
            self._graph_for(images, labels)(images, labels) if self.settings.graph else self._computed(images, labels)
        )
        self.step += 1
        with torch.no_grad():
            value = loss.detach().double()
            wrong = (logits.argmax(1) != labels).sum()
            self.sums[0] += value * len(labels)
            self.sums[1] += wrong
            self.sums[2] += len(labels)
            # Noted on the device, so that the step is known without waiting for it.
            bad = torch.where(value.isfinite(), NEVER, float(self.step))
            self.sums[3] = torch.minimum(self.sums[3], bad)

    def _computed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and logits of a step, which has moved the parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.settings.autocast(self.world.device):
            logits = first_tensor(self.parallel(images))
            loss = F.cross_entropy(logits, labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach(), logits.detach()

    def _graph_for(self, images: Tensor, labels: Tensor) -> Graphed[tuple[Tensor, Tensor]]:
        if images.shape not in self.graphs:
            self.graphs[images.shape] = graphed(self._computed, images, labels)
        return self.graphs[images.shape]

    def _look(self, wish: Stopping) -> tuple[tuple[float, ...], tuple[float, float], int]:
        """Sums over all ranks, mean loss and error since the last look, and the signal if any rank has had one."""
        own = torch.cat([self.sums, self.sums.new_tensor([float(wish.requested)])])
        rows = self.world.rows(own).cpu()
        self._check_finite(rows[:, 3].min().item())
        total = tuple(rows[:, :3].sum(0).tolist())
        count = max(total[2] - self.seen[2], 1.0)
        recent = ((total[0] - self.seen[0]) / count, (total[1] - self.seen[1]) / count)
        if self.step % LOOK_EVERY == 0:
            self.rate.observe(recent[1])
            self.seen = total
        return total, recent, int(rows[:, 4].max())

    def _check_finite(self, first_bad: float) -> None:
        if first_bad < NEVER:
            raise Diverged(f"the loss is not finite at step {int(first_bad)}{self._last_good()}")

    def _last_good(self) -> str:
        if self.folder is None:
            return ""
        return f"; the last good checkpoint is {self.folder / CHECKPOINT}, a lower learning rate (--lr) may help"

    def _end_epoch(self, logs: Logs, wish: Stopping, total: tuple[float, ...], seconds: float) -> None:
        self._check_weights()
        count = total[2]
        result = self.held_out(self.model, wish)
        if result is None:
            self.elapsed = seconds
            self._stop(int(self.world.rows(self.sums.new_tensor([float(wish.requested)])).max()))
        lr = float(self.optimizer.param_groups[0]["lr"])
        row = Epoch(
            -(-self.step // len(self.order)), self.step, lr, total[0] / count, total[1] / count, *result,
            count / max(seconds, 1e-9), seconds, memory.peak(self.world.device) / 1e6,
        )  # fmt: skip
        self.rate.after_epoch(row.held_out_error if self.validation else row.train_error)
        self.history.append(row)
        self._clear()
        best = result.error < self.best
        self.best = min(self.best, result.error)
        self.save()
        if best and self.folder is not None and self.world.main:
            checkpoint.save(self.folder / "best.pt", {"model": self.model.state_dict(), "config": self.config})
        logs.epoch(self.history)

    def _check_weights(self) -> None:
        # A loss can still be finite when the step that follows it is not.
        tensors = [*self.model.parameters(), *self.model.buffers()]
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise Diverged(f"weights are not finite after step {self.step}{self._last_good()}")

    def _stop(self, number: int) -> NoReturn:
        self._check_weights()
        self.save()
        raise Stopped(number, f"stopped by signal {number} after step {self.step}; go on with --resume")

    def save(self) -> None:
        """Write the checkpoint; every rank takes part."""
        generators = self.world.objects(checkpoint.random_state(self.world.device))
        rows = self.world.rows(self.sums).cpu()
        sums = torch.cat([rows[:, :3].sum(0), rows[:, 3:].min(0).values])
        if self.folder is None or not self.world.main:
            return
        state = {
            "config": self.config,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rate": self.rate.state_dict(),
            "random": generators,
            "step": self.step,
            "sums": sums,
            "seen": self.seen,
            "elapsed": self.elapsed,
            "history": [tuple(row) for row in self.history],
            "best": self.best,
        }
        checkpoint.save(self.folder / CHECKPOINT, state)

    def resume(self, state: dict[str, Any], source: str) -> None:
        """Continue from ``state``, a checkpoint of a training with the same configuration.

        Raises:
            ValueError: it differs, and in what; nothing has changed then.
        """
        odd = checkpoint.differences(state["config"], self.config)
        if odd:
            raise ValueError(f"resume: {source} is from a training with other settings: {'; '.join(odd)}")
        checkpoint.check_weights(self.model, state["model"], source)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.rate.load_state_dict(state["rate"])
        self.step, self.seen, self.elapsed = state["step"], state["seen"], state["elapsed"]
        self.sums = state["sums"].to(self.world.device)
        if not self.world.main:
            self.sums[:3] = 0  # those of all ranks were saved as one
        self.history = [Epoch(*row) for row in state["history"]]
        self.best = state["best"]
        checkpoint.restore_random_state(state["random"][self.world.rank], self.world.device)
