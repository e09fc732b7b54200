"""The learning rate of every step of a recipe."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fusedres.train.recipe import Drops, OneCycle, Plateau, Recipe

__all__ = ["LearningRate"]

ONE_CYCLE_START = 1 / 25


class LearningRate:
    """Sets the learning rate of ``optimizer`` before each step.

    Args:
        recipe: the schedule and the warm-up.
        optimizer: whose parameter groups it sets.
        steps_per_epoch: iterations of an epoch.
        layers: convolutions and linear layers of the network, which decide on the warm-up.

    Attributes:
        total: steps of the whole training.
    """

    def __init__(self, recipe: Recipe, optimizer: torch.optim.Optimizer, steps_per_epoch: int, layers: int) -> None:
        self.recipe = recipe
        self.optimizer = optimizer
        self.unit = steps_per_epoch if recipe.unit == "epochs" else 1
        self.total = recipe.length * self.unit
        warm_up = recipe.warm_up
        self.warming = warm_up is not None and layers >= warm_up.min_layers
        self.reduced = recipe.lr
        self.plateau: ReduceLROnPlateau | None = None
        if isinstance(recipe.schedule, Plateau):
            self.plateau = ReduceLROnPlateau(
                optimizer, factor=recipe.schedule.factor, patience=recipe.schedule.patience, threshold=0.0
            )

    def at(self, step: int) -> float:
        """The rate of step ``step``, counted from 0; warm-up and plateaus as they stand now."""
        recipe, schedule = self.recipe, self.recipe.schedule
        if self.warming and recipe.warm_up is not None:
            return recipe.warm_up.lr
        if isinstance(schedule, Drops):
            return recipe.lr * schedule.factor ** sum(step >= round(at * self.unit) for at in schedule.at)
        if isinstance(schedule, OneCycle):
            rise = max(schedule.rise * self.total, 1.0)
            if step < rise:
                return recipe.lr * (ONE_CYCLE_START + (1 - ONE_CYCLE_START) * step / rise)
            return recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / (self.total - rise)))
        return self.reduced

    def before(self, step: int) -> float:
        """Set and return the rate of step ``step``."""
        warm_up = self.recipe.warm_up
        if self.warming and warm_up is not None and warm_up.fraction is not None:
            self.warming = step < round(warm_up.fraction * self.total)
        rate = self.at(step)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):  # which a CUDA graph reads
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        return rate

    def observe(self, error: float) -> None:
        """The training error of the latest steps: ends a warm-up that waits for it."""
        warm_up = self.recipe.warm_up
        if warm_up is not None and warm_up.until_error is not None and error < warm_up.until_error:
            self.warming = False

    def after_epoch(self, error: float) -> None:
        """The error that tells a plateau."""
        if self.plateau is not None and not self.warming:
            self.plateau.step(error)
            self.reduced = float(self.optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on."""
        plateau = self.plateau.state_dict() if self.plateau is not None else None
        return {"warming": self.warming, "reduced": self.reduced, "plateau": plateau}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.warming, self.reduced = state["warming"], state["reduced"]
        if self.plateau is not None:
            self.plateau.load_state_dict(state["plateau"])
