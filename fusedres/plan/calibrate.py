"""The constants of the model of time, fitted to launches that were timed.

The logarithms of constants move so that predicted and measured times agree in their logarithms, by Gauss and Newton
with Huber's weights, which a few times that are wrong do not lead astray. A constant is thought to be right within a
factor of 1.65 before anything is measured; where measurements do not narrow that down by far it is left alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres.compiler.code import Code, Segment
from fusedres.plan.constants import BOUNDS
from fusedres.plan.gpus import Gpu
from fusedres.plan.time import LibraryCall, Timed, Work, constants_of, seconds_of

FEWEST = 20
"""Launches that a fit needs."""

PRIOR = 0.5
# A constant whose logarithm is known less well than so, of PRIOR before, is left alone; so is one on which fewer
# launches depend, each with at least such an exponent.
NARROWED, TOLD_BY, EXPONENT = 0.15, 3, 0.1
# Clocks are not better than this, and Huber's weights fall off from so many deviations on.
NOISE, HUBER = 0.01, 1.345
STEPS, STEP = 40, 1e-3


class Sample(NamedTuple):
    """A launch or a call that was timed: its kind, of `traffic.aten.KINDS`; what it is; seconds."""

    kind: str
    work: Timed
    seconds: float


class Errors(NamedTuple):
    """Of the samples of one kind: how many, the median and the 90 % quantile of |log(predicted / measured)|."""

    samples: int
    median: float
    most: float


@dataclass(frozen=True)
class Fit:
    """What came out.

    Attributes:
        values: the constants that the samples determine.
        left: why others are left alone, by name.
        before, after: errors by kind, and of all under ``"all"``.
    """

    values: Mapping[str, float]
    left: Mapping[str, str]
    before: Mapping[str, Errors]
    after: Mapping[str, Errors]


def fit(samples: Sequence[Sample], gpu: Gpu) -> Fit:
    """Constants of the model of time by samples of a GPU.

    Args:
        samples: with times above 0 and finite.
        gpu: that they were measured on; constants which it holds as measured are where the fit begins, no more.

    Raises:
        ValueError: fewer than `FEWEST` samples, or a time that is none.
    """
    if len(samples) < FEWEST:
        raise ValueError(f"launches: expected at least {FEWEST} that were timed, got {len(samples)}")
    for one in samples:
        if not (math.isfinite(one.seconds) and one.seconds > 0):
            raise ValueError(f"launches: expected times above 0, got {one.seconds}")
    plain = replace(gpu, measured={})
    usual = constants_of(plain)
    free, left = list(BOUNDS), {}
    while True:
        found, deviation, told = _fitted(samples, plain, usual, free)
        doubtful = {name: deviation[name] for name in free if deviation[name] > NARROWED or told[name] < TOLD_BY}
        if not doubtful:
            break
        # One at a time: of two that only their product tells of, one may be known once the other is given.
        worst = max(doubtful, key=lambda name: (told[name] < TOLD_BY, deviation[name]))
        free.remove(worst)
        left[worst] = (
            f"{told[worst]} launches depend on it" if told[worst] < TOLD_BY
            else f"known within a factor of {math.exp(deviation[worst]):.2f} only"
        )  # fmt: skip
    values = {name: found[name] for name in free}
    return Fit(values, left, errors(samples, plain), errors(samples, replace(plain, measured=values)))


def errors(samples: Sequence[Sample], gpu: Gpu) -> dict[str, Errors]:
    """How far predictions are from what was measured, by kind of work."""
    found: dict[str, list[float]] = {}
    for one in samples:
        error = abs(math.log(seconds_of(one.work, gpu) / one.seconds))
        found.setdefault(one.kind, []).append(error)
        found.setdefault("all", []).append(error)
    return {kind: _of(values) for kind, values in sorted(found.items(), key=lambda item: item[0] == "all")}


def _of(values: Sequence[float]) -> Errors:
    quantiles = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.9], dtype=torch.float64))
    median, most = quantiles.tolist()
    return Errors(len(values), median, most)


def _fitted(
    samples: Sequence[Sample], gpu: Gpu, usual: Mapping[str, float], free: Sequence[str]
) -> tuple[dict[str, float], dict[str, float], dict[str, int]]:
    """Values of ``free`` constants, how well their logarithms are known, and how many samples tell of each."""
    if not free:
        return {}, {}, {}
    measured = _logarithms([one.seconds for one in samples])
    start = _logarithms([usual[name] for name in free])
    least, most = (_logarithms([BOUNDS[name][side] for name in free]) for side in (0, 1))

    def residuals(at: Tensor) -> Tensor:
        changed = replace(gpu, measured=dict(zip(free, at.exp().tolist(), strict=True)))
        return _logarithms([seconds_of(one.work, changed) for one in samples]) - measured

    def slopes(at: Tensor, here: Tensor) -> Tensor:
        columns = []
        for i in range(len(free)):
            # Away from the bound, beyond which shares are held.
            step = STEP if at[i] + STEP <= most[i] else -STEP
            moved = at.clone()
            moved[i] += step
            columns.append((residuals(moved) - here) / step)
        return torch.stack(columns, 1)

    def loss(of: Tensor, at: Tensor, scale: float) -> float:
        size = of.abs() / scale
        huber = torch.where(size <= HUBER, 0.5 * size**2, HUBER * size - 0.5 * HUBER**2)
        return float(huber.sum() + 0.5 * (((at - start) / PRIOR) ** 2).sum())

    at, damping = start.clone(), 1e-3
    here = residuals(at)
    prior = torch.eye(len(free), dtype=torch.float64) / PRIOR**2
    for _ in range(STEPS):
        scale = max(NOISE, 1.4826 * float(here.abs().median()))
        weights = (HUBER / (here.abs() / scale).clamp(min=HUBER)) / scale**2
        slope = slopes(at, here)
        curvature = slope.T @ (weights[:, None] * slope) + prior
        pull = slope.T @ (weights * here) + (at - start) / PRIOR**2
        moved = None
        while damping < 1e6:
            # What lies at its bound and is pulled beyond it stays there.
            held = ((at <= least) & (pull > 0)) | ((at >= most) & (pull < 0))
            matrix = curvature + damping * curvature.diagonal().diag()
            matrix = torch.where(held[:, None] | held[None, :], torch.eye(len(free), dtype=torch.float64), matrix)
            step = torch.linalg.solve(matrix, torch.where(held, 0.0, -pull))
            trial = torch.minimum(torch.maximum(at + step.clamp(-0.7, 0.7), least), most)
            there = residuals(trial)
            if loss(there, trial, scale) < loss(here, at, scale):
                moved, damping = trial, max(damping / 5, 1e-6)
                break
            damping *= 5
        if moved is None:
            break
        done = float((moved - at).abs().max()) < 1e-5
        at, here = moved, there
        if done:
            break
    scale = max(NOISE, 1.4826 * float(here.abs().median()))
    weights = (HUBER / (here.abs() / scale).clamp(min=HUBER)) / scale**2
    slope = slopes(at, here)
    spread = torch.linalg.inv(slope.T @ (weights[:, None] * slope) + prior).diagonal().sqrt()
    return (
        dict(zip(free, at.exp().tolist(), strict=True)),
        dict(zip(free, spread.tolist(), strict=True)),
        dict(zip(free, (slope.abs() >= EXPONENT).sum(0).tolist(), strict=True)),
    )


def _logarithms(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).log()


def written(work: Timed) -> str:
    """What a time is predicted of as text, which `read` understands."""
    if isinstance(work, Work):
        parts: dict[str, Any] = work._asdict()
        return json.dumps({**parts, "code": work.code.segments}, separators=(",", ":"))
    return json.dumps(work, separators=(",", ":"))


def read(text: str) -> Timed:
    """The opposite of `written`.

    Raises:
        ValueError: it is something else.
    """
    try:
        found = json.loads(text)
        if isinstance(found, list):
            return tuple(
                LibraryCall(str(kind), int(read), int(written), int(flops), float(rate))
                for kind, read, written, flops, rate in found
            )
        straight, *loops = (Segment(*map(int, segment)) for segment in found.pop("code"))
        return Work(**{**found, "code": Code(straight, tuple(loops)), "steps": tuple(found["steps"])})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"work: expected what a launch asks of a GPU, got {text[:60]!r}: {error}") from error
