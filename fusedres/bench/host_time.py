"""What a step of a fused model costs the CPU that launches its kernels, without a GPU.

    python -m fusedres.bench.host_time --model resnet50 --schedule moments --compile

Kernels are decided on, given their arguments, and not started: what remains is Python and PyTorch's own calls, on one
thread, two images small so that these compute next to nothing. What Triton and the driver take for a launch comes on
top of it. Passes are gone through at first, and then replayed (`fusedres.runtime.replay`).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional as F

import fusedres
from fusedres.models.sources import source
from fusedres.patterns.choose import check_schedule
from fusedres.runtime import replay
from fusedres.traffic.tensors import first_tensor

__all__ = ["HostTime", "graph_time", "host_time"]


class HostTime(NamedTuple):
    """Seconds of a step: the forward pass and the backward pass (0 in inference), and how many kernels are launched."""

    forward: float
    backward: float
    launches: int


@contextmanager
def _nothing_started(target: str) -> Iterator[list[str]]:
    """Kernels for ``target`` on CPU tensors, noticed by name and not executed."""
    started: list[str] = []

    def notice(kernel: object, *_: object) -> None:
        started.append(kernel.__name__)  # type: ignore[attr-defined]

    with patch("fusedres.runtime.launch._execute", notice), fusedres.backend(f"vgpu:{target}"):
        yield started


def host_time(model: nn.Module, x: torch.Tensor, *, steps: int = 20, target: str = "sm_90") -> HostTime:
    """The median over ``steps`` steps (inference if the model is in eval mode) under autocast to bf16.

    Raises:
        ValueError: ``steps`` is below 1.
        fusedres.vgpu.Unavailable: kernels can not be compiled for a target on this machine.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    times: list[tuple[float, float]] = []
    # Rounding weights is a CPU's work here, and would be a GPU's.
    rounding = patch("fusedres.runtime.weights.copy_all", lambda *_: None)
    # Where nothing is computed, there is nothing to hold a replay against.
    unchecked = patch("fusedres.runtime.switches.STRICT", False)
    with rounding, unchecked, _nothing_started(target) as started:
        for _ in range(3 + steps):  # the first are noted
            started.clear()
            model.zero_grad(set_to_none=True)
            begin = time.perf_counter()
            with nullcontext() if model.training else torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                z = first_tensor(model(x))
            between = time.perf_counter()
            if model.training:
                F.cross_entropy(z.float(), torch.zeros(z.shape[0], *z.shape[2:], dtype=torch.long)).backward()
            times.append((between - begin, time.perf_counter() - between if model.training else 0.0))
        launches = len(started)
    forward, backward = (statistics.median(part) for part in zip(*times[3:], strict=True))
    return HostTime(forward, backward, launches)


def graph_time(model: nn.Module, x: torch.Tensor, *, steps: int = 20) -> float:
    """Median seconds of the CPU's for a step that is replayed as a CUDA graph, on the current GPU."""
    own, images = copy.deepcopy(model).cuda(), x.cuda()

    def step(images: torch.Tensor) -> torch.Tensor:
        own.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(own.training), torch.autocast("cuda", torch.bfloat16):
            z = first_tensor(own(images))
            loss = F.cross_entropy(z.float(), torch.zeros(z.shape[0], *z.shape[2:], dtype=torch.long, device=z.device))
        if own.training:
            loss.backward()
        return loss.detach()

    call, times = fusedres.graphed(step, images), []
    for _ in range(4 + steps):  # the first run as they are written, and one is captured
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call(images)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[4:])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fusedres.bench.host_time", description=__doc__)
    parser.add_argument("--model", default="resnet50", help="as `fusedres explain` takes it (default: %(default)s)")
    parser.add_argument("--schedule", default="auto", help="schedule of the fused model")
    parser.add_argument("--infer", action="store_true", help="inference instead of a training step")
    parser.add_argument("--px", type=int, help="height and width of the two images (default: the model's, at most 64)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="as torch.compile (aot_eager) runs it, too")
    options = parser.parse_args(arguments)
    try:
        check_schedule(options.schedule)
        chosen = source(options.model).of_images()
    except ValueError as error:
        parser.error(str(error))
    px = options.px or min(chosen.size[1], 64)
    if px < 1 or options.steps < 1:
        parser.error("--px and --steps must be at least 1")
    torch.set_num_threads(1)
    model = chosen.made().to(memory_format=torch.channels_last).train(not options.infer)
    fusedres.fuse(model, schedule=options.schedule)
    x = torch.randn(2, 3, px, px).to(memory_format=torch.channels_last)
    with replay.off():
        through = host_time(model, x, steps=options.steps)
    played = host_time(model, x, steps=options.steps)
    rows = {"gone through": through, "replayed": played}
    if options.compile:
        # What a compiler of kernels would make of the rest is left out: the passes are what is measured.
        compiled: Any = torch.compile(model, backend="aot_eager")
        rows["compiled"] = host_time(compiled, x, steps=options.steps)
    kind = "inference" if options.infer else "training step"
    print(f"{options.model}, {kind}, schedule {options.schedule}: {played.launches} launches, not started")
    print(f"{'ms of one CPU thread':22}{'forward':>10}{'backward':>10}")
    for name, one in rows.items():
        print(f"{name:22}{one.forward * 1e3:10.2f}{one.backward * 1e3:10.2f}")
    if torch.cuda.is_available():
        seconds = graph_time(model, x, steps=options.steps)
        print(f"{'as a CUDA graph':22}{seconds * 1e3:10.2f}{'':>10}  (all of it, by one call)")
    else:
        print(f"{'as a CUDA graph':22}one call for all of it (fusedres.graphed), timed where there is a GPU")
    return 0


if __name__ == "__main__":
    sys.exit(main())
