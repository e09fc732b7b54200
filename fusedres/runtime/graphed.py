"""A training step, or an inference, captured once as a CUDA graph and replayed: Python starts nothing any more."""

from __future__ import annotations

import inspect
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fusedres.runtime.torch_private import AnyBatchNorm, tree_leaves, tree_map_only

Out = TypeVar("Out")

WARM_UP = 3
# Captures after which numbers that change from step to step are said to be tensors better.
MANY_CAPTURES = 4

RULES = (
    "inside a graphed step nothing may wait for the GPU or look at a value (.item(), float(loss), print, .cpu(), `if` "
    "on a tensor), shapes must stay, and optimisers must be capturable (SGD is, Adam with capturable=True)"
)


class NotCapturable(RuntimeError):
    """A step that can not be captured; nothing of it has run."""


class Graphed(Generic[Out]):
    """What `graphed` gives.

    Attributes:
        captures: how often the step was captured.
    """

    def __init__(self, step: Callable[..., Out], sample: tuple[Any, ...], warm_up: int) -> None:
        self._step, self._warm_up = step, warm_up
        self._static = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), sample)
        self._device = _device_of(sample)
        self._stream = torch.cuda.Stream(self._device)
        self._graph: Any = None
        self._numbers: dict[tuple[int, int, str], Any] = {}
        self._out: Any = None
        self._optimizers: dict[Optimizer, None] = {}
        self.captures = 0

    def __call__(self, *batch: Any) -> Out:
        """One step on a batch.

        Args:
            batch: tensors of the shapes, dtypes and layouts of the sample, nested as it is.

        Returns:
            what the step returns. Its tensors are the graph's own: the next call writes to them.

        Raises:
            ValueError: the batch is of other shapes.
            NotCapturable: the step does what may not be inside.
        """
        self._fill(batch)
        with torch.cuda.device(self._device):
            if self._warm_up > 0:
                self._warm_up -= 1
                return self._by_python()
            if self._graph is None or self._numbers != _numbers(self._optimizers):
                self._capture()
            self._graph.replay()
        found: Out = self._out
        return found

    def reset(self) -> None:
        """Let go of the graph; the next call captures anew, for instance after modules were replaced or frozen."""
        self._graph, self._out = None, None

    def _fill(self, batch: tuple[Any, ...]) -> None:
        given, own = tree_leaves(batch), tree_leaves(self._static)
        if len(given) != len(own):
            raise ValueError(f"batch: expected {len(own)} values as in the sample, got {len(given)}")
        for place, (new, static) in enumerate(zip(given, own, strict=True)):
            if not isinstance(static, Tensor):
                if new is not static and new != static:
                    raise ValueError(f"batch: expected value {place} to stay {static!r}, got {new!r}")
            elif not isinstance(new, Tensor) or (new.shape, new.dtype) != (static.shape, static.dtype):
                told = f"{tuple(new.shape)} {new.dtype}" if isinstance(new, Tensor) else repr(new)
                raise ValueError(f"batch: expected value {place} as {tuple(static.shape)} {static.dtype}, got {told}")
        with torch.no_grad():
            for new, static in zip(given, own, strict=True):
                if isinstance(static, Tensor):
                    static.copy_(new, non_blocking=True)

    def _by_python(self) -> Out:
        """A step as it is written, on the stream that will be captured on, so that nothing is made there first."""
        now = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(now)
        watch = register_optimizer_step_pre_hook(self._seen)
        try:
            with torch.cuda.stream(self._stream):
                out = self._step(*self._static)
        finally:
            watch.remove()
        now.wait_stream(self._stream)
        return out

    def _seen(self, optimizer: Optimizer, *_: Any) -> None:
        self._optimizers[optimizer] = None

    def _capture(self) -> None:
        _refuse_modules(self._step)
        _refuse_optimizers(self._optimizers)
        self._graph = self._out = None
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        cached = torch.is_autocast_cache_enabled()
        # What autocast has cast before would be in the graph as it was then.
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(False)
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                out = self._step(*self._static)
        except Exception as error:
            # Ending a capture that something has broken is an error of its own.
            first = error.__context__ if isinstance(error.__context__, Exception) else error
            if not _is_of_capture(first):
                raise first from None
            raise NotCapturable(f"{_place(first, self._step)}: {_in_one_line(first)}; {RULES}") from first
        finally:
            torch.set_autocast_cache_enabled(cached)
        self._graph, self._out = graph, out
        self._numbers = _numbers(self._optimizers)
        self.captures += 1
        if self.captures == MANY_CAPTURES:
            warnings.warn(
                "fusedres: a graphed step is captured again each time that a number of its optimiser changes; with the "
                "learning rate as a tensor (lr=torch.tensor(0.1, device=...), fused=True) it is not",
                stacklevel=3,
            )


def graphed(step: Callable[..., Out], *sample: Any, warm_up: int = WARM_UP) -> Graphed[Out]:
    """A step that is captured as a CUDA graph and replayed from then on.

    A whole training step: forward, loss, backward, clipping, optimiser, GradScaler, moving averages; or an inference.
    The first calls run it as it is written, real steps on real batches, in which kernels are compiled and optimisers
    make their state; the next one captures it, and it and all after it replay that. Parameters, gradients and
    statistics are those of the model itself, so that evaluation, checkpoints and schedules between steps see them as
    ever. Numbers of an optimiser that change, such as its learning rate, make it capture again; tensors do not.

    Inside, nothing may wait for the GPU or look at a value: no ``.item()``, no ``float(loss)``, no ``print``. What is
    returned is looked at outside. Gradients that are ``None`` before a step are the graph's own memory after it.

    Args:
        step: takes what ``sample`` is like, and returns what is to be looked at.
        sample: tensors on one GPU, and constants, nested in tuples, lists and dicts.
        warm_up: calls that run as they are written, at least 1.

    Returns:
        a callable that takes batches.

    Raises:
        ValueError: the sample has no tensors on one GPU, or ``warm_up`` is less than 1.
    """
    if not isinstance(warm_up, int) or warm_up < 1:
        raise ValueError(f"warm_up: expected at least 1 call, in which kernels are compiled, got {warm_up!r}")
    _device_of(sample)
    return Graphed(step, sample, warm_up)


def _device_of(sample: tuple[Any, ...]) -> torch.device:
    devices = {leaf.device for leaf in tree_leaves(sample) if isinstance(leaf, Tensor)}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        told = ", ".join(sorted(map(str, devices))) or "no tensors"
        raise ValueError(f"sample: expected tensors on one GPU, which has graphs, got {told}")
    return next(iter(devices))


def _numbers(optimizers: dict[Optimizer, None]) -> dict[tuple[int, int, str], Any]:
    """What of optimisers is a number in the graph."""
    return {
        (i, j, name): value
        for i, optimizer in enumerate(optimizers)
        for j, group in enumerate(optimizer.param_groups)
        for name, value in group.items()
        if isinstance(value, int | float | tuple) and name != "params"
    }


def _refuse_optimizers(optimizers: dict[Optimizer, None]) -> None:
    for optimizer in optimizers:
        name = type(optimizer).__name__
        for group in optimizer.param_groups:
            able = group.get("fused") or group.get("capturable")
            if isinstance(group.get("lr"), Tensor) and not able:
                raise NotCapturable(f"{name}: without fused=True its learning rate must be a number; {RULES}")
            if not group.get("capturable", True):
                raise NotCapturable(f"{name}: expected capturable=True; {RULES}")


def _refuse_modules(step: Callable[..., Any]) -> None:
    """Refuse by name what a graph would leave out or do wrongly, of the modules that the step is seen to hold."""
    for path, module in _modules_of(step):
        averages = isinstance(module, AnyBatchNorm) and module.training and module.track_running_stats
        if averages and module.momentum is None:
            raise NotCapturable(f"{path}: momentum=None averages by a count that Python looks at; {RULES}")
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            raise NotCapturable(f"{path}: its hooks would run once, in the capture, and never again; {RULES}")


def _modules_of(step: Callable[..., Any]) -> Iterator[tuple[str, nn.Module]]:
    """Modules that a function, and the functions it calls, close over, name among their globals or are methods of."""
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("step", step)]
    while waiting:
        name, value = waiting.pop(0)
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            for inner, module in value.named_modules():
                if module is value or id(module) not in seen:
                    seen.add(id(module))
                    yield f"{name}.{inner}" if inner else name, module
        elif inspect.ismethod(value):
            owner = value.__self__
            waiting += [(f"self.{own}", held) for own, held in getattr(owner, "__dict__", {}).items()]
            waiting += [("self", owner), (name, value.__func__)]
        elif inspect.isfunction(value):
            closed = inspect.getclosurevars(value)
            waiting += [*closed.nonlocals.items(), *closed.globals.items()]


def _is_of_capture(error: Exception) -> bool:
    words = str(error).lower()
    return isinstance(error, RuntimeError) and ("captur" in words or "cudaerrorstreamcapture" in words)


def _place(error: Exception, step: Callable[..., Any]) -> str:
    """The line of the step, or of what it called, at which it went wrong; the last that is not PyTorch's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/torch/" not in frame.filename and frame.filename != __file__]
    if not own:
        return f"step {getattr(step, '__name__', step)}"
    return f"{own[-1].filename}:{own[-1].lineno} ({own[-1].line})"


def _in_one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
