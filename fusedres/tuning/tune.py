"""``fusedres.tune``: what is fastest for a model is measured on the GPU that it is on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedres.patterns.choose import forget_choices
from fusedres.plan.decisions import BLOCK, KINDS
from fusedres.plan.gpus import Gpu, device_gpu
from fusedres.runtime import plans
from fusedres.runtime.autocast import contraction_dtype
from fusedres.runtime.plans import Plan
from fusedres.swap import fuse, unfuse
from fusedres.swap.report import why_not_fused
from fusedres.traffic.predict import on_paper
from fusedres.traffic.tensors import first_tensor, tensors_in
from fusedres.tuning.blocks import Block, blocks_of, undone
from fusedres.tuning.device import Device
from fusedres.tuning.paper import Paper
from fusedres.tuning.tuner import Tuner, key_of

Sample = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


class Progress(NamedTuple):
    """How far tuning is.

    Attributes:
        done, of: blocks.
        words: what is done now.
        eager_ms, gained_ms: of a step's blocks, as far as they are done: what eager PyTorch takes, and what is spared.
    """

    done: int
    of: int
    words: str
    eager_ms: float = 0.0
    gained_ms: float = 0.0


@dataclass(frozen=True)
class Tuning:
    """What was found for a model.

    Attributes:
        title: of the model and its step.
        blocks: one dict for each kind of call, as the plan's file has it: ``title``, ``count`` in a step, ``batch``,
            ``ms`` by rung, ``rung`` chosen, ``left_out`` with reasons.
        step: the whole step: ``eager_ms`` and ``tuned_ms`` (20 % quantile, median, 80 % quantile), ``back``.
        plan: all that is known of the GPU.
        path: of the file; None where it could not be written.
    """

    title: str
    blocks: tuple[dict[str, Any], ...]
    step: dict[str, Any]
    plan: Plan
    path: Path | None


def tune(
    model: nn.Module,
    sample: Sample,
    *,
    title: str | None = None,
    fresh: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Tuning:
    """Measure on the GPU that a model is on what `fuse` is to take for it, and keep that.

    Each kind of block is timed by eager PyTorch and on every rung, then what the fastest rung chooses inside; what does
    not compile, start or agree with fp64 is left out. Then the whole step is timed against eager PyTorch's, and blocks
    go back to that until it is not slower. A model in training mode is tuned for forward and backward passes, one in
    evaluation mode for inference. Autocast, TF32, cuDNN's settings and determinism are as the caller has them, and the
    model is left as it was. From then on `fuse` goes by what was found, in this process and in later ones.

    Args:
        model: on a GPU, fused or not; any that `fuse` takes.
        sample: what its forward takes: a tensor, a tuple of arguments, or keyword arguments.
        title: of the model, for people; its class and size if not given.
        fresh: measure again what was measured before.
        progress: is told what is done.

    Returns:
        `Tuning`. Where another process of this machine tunes, what that found is waited for and used.

    Raises:
        TypeError: the model is no module, or the sample no tensor, tuple, list or mapping.
        ValueError: nothing of the model is fused, or the two are not on one GPU.
        RuntimeError: the GPU failed; what was found until then is kept, and the next call goes on.
    """
    device = _checked(model, sample)
    step = _Step.of(model, sample)
    with torch.cuda.device(device), undone(model):
        gpu = device_gpu(device.index if device.index is not None else torch.cuda.current_device())
        twins = {"eager": unfuse(copy.deepcopy(model)), "tuned": fuse(copy.deepcopy(model))}
        _refuse_plain(twins["tuned"])
        blocks = blocks_of(twins["tuned"], lambda: step.forward(twins["tuned"]))
        if not blocks:
            raise ValueError("model: nothing of it runs fused on this sample")
        title = f"{title or _title(model)}, {step.title(sample)}"
        path = plans.path_for(gpu)
        with plans.locked(path):
            bench = Device(device, gpu, {name: lambda twin=twin: step.run(twin) for name, twin in twins.items()})  # type: ignore[misc]
            return tuned_on(title, blocks, bench, gpu, path, fresh=fresh, progress=progress)


def tuned_on(
    title: str,
    blocks: Sequence[Block],
    bench: Any,
    gpu: Gpu,
    path: Path,
    *,
    fresh: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Tuning:
    """Go on with what was begun, and keep what is found.

    Args:
        title: of the step.
        blocks: of it.
        bench: the `tuning.tuner.Workbench` that measures.
        gpu: that it does so on.
        path: of the plan, whose lock this process has.
        fresh, progress: as of `tune`.
    """
    known = plans.read_or_set_aside(path)
    if known is None or known.why_not(gpu) is not None:
        known = Plan.of(gpu)
    part = path.with_suffix(".part")
    plan = None if fresh else _unfinished(part, gpu)
    if plan is None:
        plan = Plan.of(gpu)
        if not fresh:
            plan.add(known)

    def keep() -> None:
        plans.write(plan, part)

    tuner = Tuner(bench, plan, keep=keep)
    tuner.say = _telling(progress, tuner, blocks)
    keys = [key_of(block.site) for block in blocks]
    step = plan.steps.get(title, {})
    if step.get("blocks") != keys or "failed" in step or not all(plan.blocks.get(key, {}).get("done") for key in keys):
        tuner.tune(blocks)
        step = tuner.whole_step(title, blocks)
    known.add(plan)
    written = plans.write(known, path)
    if written:
        part.unlink(missing_ok=True)
    plans.set_default(gpu, known)
    forget_choices()
    tuner.say(len(blocks), "done")
    return Tuning(title, tuple(known.blocks[key] for key in keys), step, known, path if written else None)


def _telling(
    progress: Callable[[Progress], None] | None, tuner: Tuner, blocks: Sequence[Block]
) -> Callable[[int, str], None]:
    """Tells ``progress`` what a tuner says."""

    def say(place: int, words: str) -> None:
        if progress is not None:
            progress(Progress(place, len(blocks), words, *tuner.gained(blocks)))

    return say


def _unfinished(part: Path, gpu: Gpu) -> Plan | None:
    """What an interrupted tuning has left."""
    found = plans.read_or_set_aside(part)
    return found if found is not None and found.why_not(gpu) is None else None


@dataclass(frozen=True)
class Estimate:
    """What tuning would do.

    Attributes:
        plan: what is predicted to be fastest, by block.
        blocks: as of `Tuning`.
        step: as of `Tuning`.
        candidates: that would be measured.
        binaries: that would be compiled.
        seconds: that it would take on that GPU, predicted.
    """

    plan: Plan
    blocks: tuple[dict[str, Any], ...]
    step: dict[str, Any]
    candidates: int
    binaries: int
    seconds: float


def estimate(
    model: nn.Module,
    images: Tensor,
    gpu: Gpu,
    *,
    infer: bool = False,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    title: str | None = None,
    inside: bool = True,
    progress: Callable[[Progress], None] | None = None,
) -> Estimate:
    """What tuning a model on a GPU would measure, and what is predicted to be found there. Nothing runs.

    Args:
        model: on the meta device; it becomes a fused one.
        images: (N, C, H, W), what its forward takes, on the meta device.
        gpu: that it is thought to run on.
        infer: for inference.
        autocast: makes what the step runs inside.
        title: of the model, for people.
        inside: whether to look inside the rungs, too, which tells how many candidates there are.
        progress: is told what is done.

    Raises:
        ValueError: nothing of the model is fused.
    """
    _refuse_plain(fuse(model))
    model.train(not infer)
    blocks: list[Block] = []
    with torch.set_grad_enabled(not infer):
        step = _Step.of(model, images)

        def gone_through() -> str:
            with autocast():
                blocks.extend(blocks_of(model, lambda: step.forward(model)))
                return step.title(images)

        said: list[str] = []
        on_paper(lambda: said.append(gone_through()), gpu)
    plan, bench = Plan.of(gpu, measured=False), Paper(gpu, blocks)
    tuner = Tuner(bench, plan, inside=inside)
    tuner.say = _telling(progress, tuner, blocks)
    tuner.tune(blocks)
    found = tuner.whole_step(f"{title or _title(model)}, {said[0]}", blocks)
    for kind in KINDS:
        if kind != BLOCK:  # predictions tell rungs apart, not tiles of a few per cent
            plan.decisions.entries[kind].clear()
    entries = tuple(plan.blocks[key_of(block.site)] for block in blocks)
    return Estimate(plan, entries, found, bench.candidates, len(bench.binaries), bench.seconds)


def _checked(model: nn.Module, sample: Sample) -> torch.device:
    """The GPU that both are on."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(sample, Tensor | tuple | list | Mapping):
        raise TypeError(f"sample: expected a tensor, a tuple of arguments or keywords, got {type(sample).__name__}")
    found = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    given = {tensor.device for tensor in tensors_in(sample)}
    if len(found | given) != 1 or next(iter(found)).type != "cuda":
        raise ValueError(
            f"model, sample: expected both on one GPU, got {_devices(found)} and {_devices(given)}; without a GPU, "
            "fusedres tune --predict tells what is predicted"
        )
    return next(iter(found))


def _devices(found: set[torch.device]) -> str:
    return ", ".join(sorted(map(str, found))) or "nothing"


def _refuse_plain(model: nn.Module) -> None:
    why = why_not_fused(model)
    if why is not None:
        raise ValueError(f"model: {why}")


def _title(model: nn.Module) -> str:
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return f"{type(model).__name__} ({millions:.1f} M parameters)"


@dataclass(frozen=True)
class _Step:
    """A step of the model alone, as the caller would make it.

    Attributes:
        args, kwargs: of its forward.
        training: whether a backward pass follows.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    training: bool

    @classmethod
    def of(cls, model: nn.Module, sample: Sample) -> _Step:
        if isinstance(sample, Tensor):
            args, kwargs = (sample,), {}  # type: tuple[Any, ...], Mapping[str, Any]
        elif isinstance(sample, Mapping):
            args, kwargs = (), sample
        else:
            args, kwargs = tuple(sample), {}
        return cls(args, kwargs, model.training and torch.is_grad_enabled())

    def title(self, sample: Sample) -> str:
        """What is stepped through."""
        tensor = first_tensor(sample)
        dtype = contraction_dtype(tensor)
        size = "x".join(map(str, tensor.shape))
        return f"{size} {str(dtype).removeprefix('torch.')} {'training' if self.training else 'inference'}"

    def forward(self, model: nn.Module) -> Any:
        with torch.set_grad_enabled(self.training):
            return model(*self.args, **self.kwargs)

    def run(self, model: nn.Module) -> None:
        """Forward, and in training backward from a gradient that is there."""
        found = self.forward(model)
        if not self.training:
            return
        outputs = [tensor for tensor in tensors_in(found) if tensor.requires_grad]
        with torch.autocast(outputs[0].device.type, enabled=False):
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        for parameter in model.parameters():
            parameter.grad = None
