"""The rung that a pattern runs on, from what was asked for, its shapes and the GPU.

Every candidate, eager PyTorch among them, is gone through on paper, forward and back, and takes what a model of time
says of its launches (`plan.time`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fusedres.context import context, here
from fusedres.operands import Layer, Norm
from fusedres.plan.gpus import Gpu
from fusedres.plan.schedule import SCHEDULES, Schedule
from fusedres.runtime import autocast, backends
from fusedres.runtime.call import Call
from fusedres.traffic.predict import Prediction, predicted
from fusedres.traffic.saved import saved_by
from fusedres.traffic.weigh import on_meta

AUTO, MEMORY = "auto", "memory"
CHOSEN = {AUTO: "the fastest by prediction", MEMORY: "what keeps fewest bytes for the backward pass"}
"""What is no rung, but chooses one."""

LIBRARY = Schedule("library", bit_masks=False)
"""What `auto` runs where no kernel of ours does: one library call per op, each written once, nothing formed twice."""
EAGER = Schedule("eager", bit_masks=False)
"""The plain calls of PyTorch, where no rung is predicted to be faster."""


class Pattern(Protocol):
    """One call of a pattern."""

    x: Tensor
    """(N, C, H, W)."""
    schedule: str
    """A rung, or how it is chosen."""

    @property
    def norms(self) -> Iterable[Norm]:
        """Every batch norm."""

    @property
    def tensors(self) -> Iterable[Tensor | None]:
        """Everything but x that autograd may ask a gradient of."""

    @property
    def shape(self) -> Hashable:
        """What the time of a call depends on, x and dtypes left out."""

    def check(self, call: Call) -> None:
        """Refuse what eager PyTorch would refuse."""

    def infer(self, call: Call) -> Tensor:
        """The pass from running statistics, of which nothing is kept."""

    def train(self, call: Call) -> Tensor:
        """The pass that autograd may follow."""

    def plain(self, call: Call) -> Tensor:
        """The same by eager PyTorch."""


@dataclass(frozen=True)
class Choice:
    """The schedule that a call runs on, why, and what each candidate would take and keep for its backward pass."""

    schedule: Schedule
    reason: str
    estimates: Mapping[str, Prediction]
    saved: Mapping[str, int]


def check_schedule(name: str) -> None:
    """Refuse a name that is neither a rung of the ladder nor a way to choose one."""
    if not isinstance(name, str) or (name not in CHOSEN and name not in SCHEDULES):
        raise ValueError(f"schedule: expected one of {[*CHOSEN, *SCHEDULES]}, got {name!r}")


class _Key(NamedTuple):
    pattern: type
    shape: Hashable
    size: tuple[int, ...]
    grads: tuple[bool, ...]
    schedule: str
    backend: str
    training: bool
    call: Call
    gpu: Gpu


_choices: dict[_Key, Choice] = {}
# Networks have tens of blocks; a program that changes its shapes without end must not keep them all.
MOST_CHOICES = 4096


def choose(pattern: Pattern, call: Call, gpu: Gpu, *, training: bool) -> Choice:
    """What a call of a pattern runs on where nobody has chosen a rung; made once for a shape.

    Args:
        pattern: the call.
        call: what was decided at the door.
        gpu: that runs it.
        training: whether statistics are measured or a backward pass may follow.

    Returns:
        A `Choice`; of candidates that take equally long the one that moves least.
    """
    grads = (pattern.x.requires_grad, *(tensor is not None and tensor.requires_grad for tensor in pattern.tensors))
    key = _Key(
        type(pattern), pattern.shape, tuple(pattern.x.shape), grads, pattern.schedule, backends.current(), training,
        call, gpu,
    )  # fmt: skip
    found = _choices.get(key)
    if found is None:
        if len(_choices) >= MOST_CHOICES:
            _choices.clear()
        found = _choices[key] = _weighed(pattern, call, gpu, training)
    return found


def forget_choices() -> None:
    """Let every choice be made anew."""
    _choices.clear()


def _weighed(pattern: Pattern, call: Call, gpu: Gpu, training: bool) -> Choice:
    # Who asks for kernels, or executes them without a GPU, has ruled out what runs none.
    candidates = {**({EAGER.name: EAGER} if backends.current() == backends.DEFAULT else {}), **SCHEDULES}
    if not training:
        candidates = {name: rung for name, rung in candidates.items() if rung in (EAGER, SCHEDULES["block_end"])}
    estimates: dict[str, Prediction] = {}
    saved: dict[str, int] = {}
    for name, rung in candidates.items():
        kept: list[int] = []
        estimates[name] = predicted(lambda rung=rung, kept=kept: _gone_through(pattern, rung, call, kept), gpu)  # type: ignore[misc]
        saved[name] = sum(kept)

    def time(name: str) -> tuple[float, ...]:
        return estimates[name].seconds, estimates[name].moved

    if pattern.schedule == MEMORY:
        best = min(candidates, key=lambda name: (saved[name], *time(name)))
    else:
        best = min(candidates, key=time)
    return Choice(candidates[best], _reason(best, estimates, saved, pattern.schedule, gpu), estimates, saved)


def _gone_through(pattern: Pattern, rung: Schedule, call: Call, kept: list[int]) -> None:
    """A call of a copy of the pattern on the meta device, forward and back."""
    twin: Any = on_meta(pattern)
    twin.schedule = rung.name
    with autocast.on_meta(call.dtype) if call.autocast else nullcontext():
        now = Call.on(twin.x, twin.tensors)
        training = now.differentiated or any(norm.numbers.batch_stats for norm in twin.norms)

        def forward() -> Tensor:
            if rung is EAGER:
                return twin.plain(now)
            if training:
                return twin.train(now)
            with now.without_autocast():
                return twin.infer(now)

        if not now.differentiated:
            forward()
            return
        out: list[Tensor] = []

        def noted() -> Tensor:
            out.append(forward())
            return out[0]

        owned = [tensor for tensor in (twin.x, *twin.tensors) if tensor is not None]
        kept.append(int(saved_by(owned, noted).total))
        torch.autograd.backward(out, [torch.empty_like(out[0])])


def _reason(best: str, estimates: Mapping[str, Prediction], saved: Mapping[str, int], schedule: str, gpu: Gpu) -> str:
    def words(name: str) -> str:
        one = estimates[name]
        kept = f", {saved[name] / 1e6:.0f} MB kept" if schedule == MEMORY else ""
        return f"{one.seconds * 1e3:.3g} ms ({one.moved / 1e6:.0f} MB, {one.launches} launches{kept})"

    others = sorted((name for name in estimates if name != best), key=lambda name: estimates[name].seconds)
    bound = ", as long as the host takes to start its launches" if estimates[best].started else ""
    alike = "" if gpu.alike is None else f", taken for a scaled {gpu.alike}"
    rest = "".join(f"; {name} {words(name)}" for name in others[:2])
    return f"predicted {words(best)} on {gpu.name}{alike}{bound}{rest}"


def chain_schedule(requested: str, *, kernels: bool) -> Schedule:
    """The schedule that a rung's name stands for, and where there is nothing to choose from what is run.

    Args:
        requested: a rung, or how one is chosen.
        kernels: whether ops run theirs.
    """
    if requested == MEMORY:
        return SCHEDULES["moments"]
    return SCHEDULES.get(requested, SCHEDULES["prologue"] if kernels else LIBRARY)


def use_moments(requested: str, layer: Layer, call: Call) -> bool:
    """Whether a block's last convolution (or its projection) is never written.

    The moments of C channels cost C / K of the convolution, forward and backward, and spare the K channels of its
    output. For a bottleneck's end, C / K is a quarter; at a half they still spare more memory than they take.

    Args:
        requested: a rung or ``"auto"``.
        layer: the convolution and its batch norm.
        call: what was decided at the door.
    """
    (k, c), geometry = layer.weight.shape[:2], layer.geometry
    pointwise = layer.window == (1, 1) and geometry.padding == (0, 0) and geometry.groups == 1
    if requested == AUTO:
        by_library = call.device == "cpu" and not call.kernels and call.dtype == torch.float32
        return pointwise and by_library and 4 * c <= k and c <= AUTO_MOMENTS_CHANNELS
    return chain_schedule(requested, kernels=call.kernels).moments and pointwise and 2 * c <= k


AUTO_MOMENTS_CHANNELS = 64


def listening(listener: Callable[[Choice], None]) -> AbstractContextManager[None]:
    """Tell ``listener`` of every choice that is made for a call inside the ``with`` block."""
    return context(listeners=(*here().listeners, listener))


def announce(choice: Choice) -> None:
    """Tell whoever listens."""
    for listener in here().listeners:
        listener(choice)
