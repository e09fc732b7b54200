"""What a pass takes on a GPU that need not be here: it is gone through on paper, and a model times what it launches.

Launches and library calls are seen on the meta device and on a thread of its own, which has none of the modes, hooks
and accounts of the one that asks.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fusedres.compiler.known import executed
from fusedres.compiler.targets import TARGETS
from fusedres.context import context, entered, here
from fusedres.plan.gpus import Gpu
from fusedres.plan.time import BAND, Assumptions, LibraryCall, Work, launch_seconds, library_seconds
from fusedres.runtime import backends
from fusedres.runtime.launch import Launch, Trace
from fusedres.runtime.torch_private import DispatchMode
from fusedres.traffic.aten import Call, Made, costs, laid_out

# Python takes this long to start a kernel.
HOST_SECONDS = 10e-6


@dataclass(frozen=True)
class Prediction:
    """What a pass takes.

    Attributes:
        band: seconds of the GPU: optimistic, central, pessimistic.
        launches: how many.
        moved: bytes.
        flops: floating-point operations.
        alike: launches of which only a binary like theirs is known.
    """

    band: tuple[float, float, float]
    launches: int
    moved: int
    flops: int
    alike: int

    @property
    def host(self) -> float:
        """Seconds in which Python starts the launches."""
        return self.launches * HOST_SECONDS

    @property
    def seconds(self) -> float:
        """Of the GPU, or of the host where that takes longer."""
        return max(self.band[1], self.host)

    @property
    def started(self) -> bool:
        """Whether it is the host that takes longer."""
        return self.host > self.band[1]


_watched: list[list[Launch]] = []


@contextmanager
def watching() -> Iterator[list[Launch]]:
    """Every launch that is gone through on paper inside the ``with`` block, whatever is chosen in the end."""
    found: list[Launch] = []
    _watched.append(found)
    try:
        yield found
    finally:
        _watched.remove(found)


def predicted(run: Callable[[], object], gpu: Gpu) -> Prediction:
    """What ``run``, whose tensors are on the meta device, would take on a GPU.

    Ops choose their faces as on that GPU under the backend of the one that asks, and autograd is on where it is there.
    What ``run`` raises is raised.
    """
    found = on_paper(run, gpu)
    for watcher in _watched:
        watcher.extend(one for one in found if isinstance(one, Launch))
    return prediction(found, gpu)


def on_paper(
    run: Callable[[], object], gpu: Gpu, *, witness: list[Any] | None = None, keep: bool = False
) -> list[Launch | Call]:
    """What ``run``, whose tensors are on the meta device, would launch and call on a GPU, in order; as `predicted`.

    Args:
        run: the pass.
        gpu: that it is thought to run on.
        witness: is told of every site where something is decided (`plan.decisions`).
        keep: with the arguments, to launch it again.
    """
    found: list[Launch | Call] = []
    raised: list[BaseException] = []
    asking, grad = here(), torch.is_grad_enabled()
    backend = asking.backend if backends.current() == backends.DEFAULT else "triton"

    def noted() -> None:
        trace = Trace(gpu.target, keeps=keep)
        trace.launches = _Listed(found)
        on_gpu = context(
            account=trace,
            gpu=gpu,
            dry_target=gpu.target,
            backend=backend,
            follower=None,
            listeners=(),
            replays=False,
            witness=witness,
            gathered=None,
        )
        try:
            with entered(asking), on_gpu, torch.set_grad_enabled(grad), _Calls(found, keep):
                run()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=noted)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return found


def prediction(work: Iterable[Launch | Call], gpu: Gpu) -> Prediction:
    """What launches and library calls take, one after the other."""
    every = list(work)
    optimistic, central, pessimistic = (sum(_seconds(one, gpu, given) for one in every) for given in BAND)
    return Prediction(
        (optimistic, central, pessimistic),
        len(every),
        sum(_moved(one) for one in every),
        sum(one.flops if isinstance(one, Launch) else one.cost.flops for one in every),
        sum(isinstance(one, Launch) and not is_known(one, gpu) for one in every),
    )


def _seconds(one: Launch | Call, gpu: Gpu, given: Assumptions) -> float:
    if isinstance(one, Call):
        return library_seconds(*library_call_of(one, gpu), gpu, given)
    work = work_of(one, gpu)
    if work is not None:
        return launch_seconds(work, gpu, given)
    # A kernel of which nothing is known.
    return max(_moved(one) / (given.rows * gpu.tb_per_s * 1e12), one.flops / (gpu.fp32_tflops * 1e12)) + given.gap


def library_call_of(one: Call, gpu: Gpu) -> LibraryCall:
    """A library's kernel as the model of time is told of it."""
    cost, tf32 = one.cost, one.tf32 and TARGETS[gpu.target].backend == "cuda"
    return LibraryCall(cost.kind, cost.read + cost.reread, cost.written, cost.flops, gpu.peak(one.dtype, tf32=tf32))


def work_of(launch: Launch, gpu: Gpu) -> Work | None:
    """What a launch asks of a GPU, by its binary or the one known that is most like it; None: nothing is known."""
    known = executed(launch.binary, gpu.target)
    if known is None:
        return None
    blocks, contracts = math.prod(launch.grid), any(part.multiply_adds for part in known.code.segments)
    return Work(
        blocks, launch.num_warps, known.registers, known.shared, launch.num_stages, known.code, launch.steps,
        _moved(launch), contracts,
    )  # fmt: skip


def is_known(launch: Launch, gpu: Gpu) -> bool:
    """Whether a launch is predicted from its own binary, and not from one like it."""
    known = executed(launch.binary, gpu.target)
    return known is not None and known.read


def _moved(one: Launch | Call) -> int:
    if isinstance(one, Launch):
        return one.bytes_read + one.bytes_written
    return one.cost.read + one.cost.reread + one.cost.written


class _Listed(list[Launch]):
    """A trace's launches, which join the library's calls in order."""

    def __init__(self, found: list[Launch | Call]) -> None:
        super().__init__()
        self.found = found

    def append(self, launch: Launch) -> None:
        self.found.append(launch)


class _Calls(DispatchMode):
    """Takes down the library's calls."""

    def __init__(self, found: list[Launch | Call], keep: bool) -> None:
        super().__init__()
        self.found, self.keep = found, keep

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = laid_out(func, args, func(*args, **kwargs))
        calls = [Call.of(cost, args) for cost in costs(func, args, kwargs, out, grad_twice=True)]
        if self.keep:
            made = Made(func, args, kwargs)
            calls = [call._replace(made=made) for call in calls]
        self.found.extend(calls)
        return out
