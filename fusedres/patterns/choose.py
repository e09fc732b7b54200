"""The rung that a pattern runs on, from what was asked for, its shapes and the GPU.

Every candidate, eager PyTorch among them, is gone through on paper, forward and back, and takes what a model of time
says of its launches (`plan.time`).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fusedres.context import context, here
from fusedres.operands import Layer, Norm
from fusedres.plan.decisions import BLOCK, Decisions, Site, spelt
from fusedres.plan.gpus import Gpu
from fusedres.plan.schedule import SCHEDULES, Schedule
from fusedres.runtime import autocast, backends, plans
from fusedres.runtime.ahead import compile_missing, is_wanted
from fusedres.runtime.call import Call
from fusedres.runtime.launch import Launch, target_name
from fusedres.traffic.predict import Prediction, on_paper, predicted
from fusedres.traffic.saved import saved_by
from fusedres.traffic.weigh import on_meta

_log = logging.getLogger(__name__)

AUTO, MEMORY = "auto", "memory"
CHOSEN = {AUTO: "the fastest by prediction", MEMORY: "what keeps fewest bytes for the backward pass"}
"""What is no rung, but chooses one."""

LIBRARY = Schedule("library", bit_masks=False)
"""What `auto` runs where no kernel of ours does: one library call per op, each written once, nothing formed twice."""
EAGER = Schedule("eager", bit_masks=False)
"""The plain calls of PyTorch, where no rung is predicted to be faster."""


PREDICTED = "predicted"
MEASURING = "measuring"
"""A turn among candidates (`patterns.online`)."""


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
    """The schedule that a call runs on, why, and what each candidate would take and keep for its backward pass.

    ``source``: whether that was measured, where and when, or predicted.
    """

    schedule: Schedule
    reason: str
    estimates: Mapping[str, Prediction]
    saved: Mapping[str, int]
    source: str = PREDICTED


@dataclass(frozen=True, eq=False)
class Gathered:
    """A call that was taken down.

    Attributes:
        site: by which a choice for it is kept.
        pattern: the call on the meta device.
        training: whether statistics are measured or a backward pass may follow.
        call: what was decided at the door.
        owner: the module whose pass it was, if it was one's.
        result: what it gave, on the meta device.
    """

    site: Site
    pattern: Pattern
    training: bool
    call: Call
    owner: Any
    result: Tensor


@contextmanager
def gathering() -> Iterator[list[Gathered]]:
    """Take down every call whose rung ``"auto"`` chooses, and run it by eager PyTorch, inside the ``with`` block."""
    found: list[Gathered] = []
    with context(gathered=found):
        yield found


def run_on(pattern: Pattern, rung: Schedule, *, training: bool) -> Tensor:
    """A call of a copy of the pattern on a rung, or by eager PyTorch, as its door would run it."""
    own: Any = copy.copy(pattern)
    own.schedule = rung.name
    own.x = own.x.resolve_neg()
    call = Call.on(own.x, own.tensors)
    own.check(call)
    if rung is EAGER:
        return own.plain(call)
    if training:
        return own.train(call)
    with call.without_autocast():
        return own.infer(call)


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
    decisions: Decisions | None
    shared: bool


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
    # What was chosen for a GPU on paper is what is chosen on it.
    asked = replace(call, device="cuda") if call.device == "meta" else call
    key = _Key(
        type(pattern), pattern.shape, tuple(pattern.x.shape), grads, pattern.schedule, backends.current(), training,
        asked, gpu, here().decisions, _is_shared(pattern),
    )  # fmt: skip
    found = _choices.get(key)
    if found is None:
        if len(_choices) >= MOST_CHOICES:
            _choices.clear()
        found = _choices[key] = _decided(pattern, call, gpu, training) or _weighed(pattern, call, gpu, training)
        kind = type(pattern).__name__.lstrip("_").lower()
        _log.info("%s of %s: %s, %s", kind, tuple(pattern.x.shape), found.schedule.name, found.reason)
        if found.schedule is not EAGER and is_wanted(pattern.x.device):
            _prepare(pattern, found.schedule, call, gpu)
    return found


def _prepare(pattern: Pattern, rung: Schedule, call: Call, gpu: Gpu) -> None:
    """Compile what a call launches on its rung, and its backward pass, where no network did so for all of its blocks.

    What can not be gone through on paper is compiled as it is launched.
    """
    if gpu.target != target_name(pattern.x.get_device()):
        return
    with suppress(Exception):
        found = on_paper(lambda: gone_through(pattern, rung, call, []), gpu)
        compile_missing([one.binary for one in found if isinstance(one, Launch)], gpu.target)


def forget_choices() -> None:
    """Let every choice be made anew."""
    _choices.clear()


def candidates_for(training: bool) -> dict[str, Schedule]:
    """What a call may run on, by name."""
    # Who asks for kernels, or executes them without a GPU, has ruled out what runs none.
    candidates = {**({EAGER.name: EAGER} if backends.current() == backends.DEFAULT else {}), **SCHEDULES}
    if not training:
        candidates = {name: rung for name, rung in candidates.items() if rung in (EAGER, SCHEDULES["block_end"])}
    return candidates


def _is_shared(pattern: Pattern) -> bool:
    return any(norm.numbers.is_shared for norm in pattern.norms)


def _candidates(pattern: Pattern, training: bool) -> dict[str, Schedule]:
    """What a call may run on; where processes share statistics, each may take another rung by the size of its batch.

    All rungs have the same collectives in the same order, of which PyTorch's separate modules have another.
    """
    found = candidates_for(training)
    return {name: rung for name, rung in found.items() if rung is not EAGER} if _is_shared(pattern) else found


def site_of(pattern: Pattern, call: Call, training: bool) -> Site:
    """What a choice of a rung is kept by, from one process to the next."""
    x = pattern.x
    rows = x.is_contiguous(memory_format=torch.channels_last)
    grads = (x.requires_grad, *(tensor is not None and tensor.requires_grad for tensor in pattern.tensors))
    asked = "".join("g" if grad else "-" for grad in grads) if call.differentiated else "no gradients"
    flags = [
        "training" if training else "evaluation", *["autocast"] * call.autocast, *["tf32"] * call.tf32,
        *["deterministic"] * torch.are_deterministic_algorithms_enabled(), "channels_last" if rows else "contiguous",
    ]  # fmt: skip
    told = type(pattern).__name__, tuple(x.shape[1:]), x.dtype, call.dtype, " ".join(flags), asked, pattern.shape
    return Site(BLOCK, spelt(told), x.shape[0])


def _decided(pattern: Pattern, call: Call, gpu: Gpu, training: bool) -> Choice | None:
    """What a plan says, if it says anything of this call."""
    if pattern.schedule != AUTO or backends.current() != backends.DEFAULT:
        return None
    plan, shipped = here().decisions, plans.shipped_for(gpu) if call.device == "cuda" else None
    every = [one for one in (plan, None if shipped is None else shipped.decisions) if one is not None]
    if not every:
        return None
    site, candidates = site_of(pattern, call, training), _candidates(pattern, training)
    for decisions in every:
        found = decisions.find(site)
        if found is not None and found["rung"] in candidates:
            ms = found.get("ms", {})
            told = ", ".join(f"{name} {ms[name]:.3g} ms" for name in sorted(ms, key=lambda name: float(ms[name])))
            batch = found.get("batch", site.size)
            other = "" if batch == site.size else f" at batch {batch}"
            return Choice(candidates[found["rung"]], f"{decisions.origin}{other}: {told}", {}, {}, decisions.origin)
    return None


def _weighed(pattern: Pattern, call: Call, gpu: Gpu, training: bool) -> Choice:
    candidates = _candidates(pattern, training)
    estimates: dict[str, Prediction] = {}
    saved: dict[str, int] = {}
    for name, rung in candidates.items():
        kept: list[int] = []
        estimates[name] = predicted(lambda rung=rung, kept=kept: gone_through(pattern, rung, call, kept), gpu)  # type: ignore[misc]
        saved[name] = sum(kept)

    def time(name: str) -> tuple[float, ...]:
        return estimates[name].seconds, estimates[name].moved

    if pattern.schedule == MEMORY:
        best = min(candidates, key=lambda name: (saved[name], *time(name)))
    else:
        best = min(candidates, key=time)
    return Choice(candidates[best], _reason(best, estimates, saved, pattern.schedule, gpu), estimates, saved)


def gone_through(pattern: Pattern, rung: Schedule, call: Call, kept: list[int]) -> None:
    """A call of a copy of the pattern on the meta device, forward and back."""
    twin: Any = on_meta(pattern)
    with autocast.on_meta(call.dtype) if call.autocast else nullcontext():
        now = Call.on(twin.x, twin.tensors)
        training = now.differentiated or any(norm.numbers.batch_stats for norm in twin.norms)
        if not now.differentiated:
            run_on(twin, rung, training=training)
            return
        out: list[Tensor] = []

        def noted() -> Tensor:
            out.append(run_on(twin, rung, training=training))
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
