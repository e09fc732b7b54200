"""The workbench that a GPU is: candidates run there on operands of the real shapes, held against fp64, and timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedres.compiler.ahead import compile_ahead
from fusedres.compiler.binary import Binary
from fusedres.measure.accuracy import FACTOR, OF_THE_INPUT, Observed, allowance, errors, worst
from fusedres.measure.timing import Timing, cache_bytes, clock_for, interleave
from fusedres.patterns.choose import EAGER, candidates_for, run_on
from fusedres.plan.decisions import Decisions, Seen, entered
from fusedres.plan.gpus import Gpu
from fusedres.plan.schedule import SCHEDULES
from fusedres.tuning.blocks import Block, autocast_of, made_real
from fusedres.tuning.dry import gone
from fusedres.tuning.tuner import EAGER_FAILED, Candidate, Unusable

ROUNDS, WARM_UP, TURN = 5, 1, 0.02
PYTHON_ROUNDS = 3
# Of the whole step, which takes longer and decides more.
STEP_ROUNDS, STEP_SECONDS = 15, 20.0
# Images for which blocks are computed in fp64, and draws of them: as the gate of `fusedres bench` has it.
SMALL, DRAWS, MORE_DRAWS = 4, 3, 8
# Where calls take this much longer when Python starts them than when a graph does, they are timed as Python starts
# them, which is how they will run.
HOST_BOUND = 1.2
# Calls that a graph holds at most: operands that are smaller in all than twice the L2 cache are found there.
MOST_CALLS = 32
COMPILE_SECONDS = 60.0
SEED = 20151210


@dataclass(frozen=True, eq=False)
class _Case:
    """A call with real operands.

    Attributes:
        pattern: the call.
        grad: that arrives at its output; None where nobody differentiates.
        statistics: running ones, by name, and what they were at first.
    """

    pattern: Any
    grad: Tensor | None
    statistics: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, pattern: Any, grad: Tensor | None) -> _Case:
        named = {
            f"{name} {i}": tensor
            for i, norm in enumerate(pattern.norms)
            for name, tensor in (("running mean", norm.running_mean), ("running variance", norm.running_var))
            if tensor is not None
        }
        return cls(pattern, grad, {name: (tensor, tensor.clone()) for name, tensor in named.items()})


class Device:
    """A `Workbench` on a CUDA or HIP device.

    Args:
        device: that it is.
        gpu: its data sheet.
        step: what makes a step of the model, eager PyTorch's and the fused one's, by these names.
        jobs: processes that compile; as many as there are cores if not given.
    """

    def __init__(
        self, device: torch.device, gpu: Gpu, step: Mapping[str, Callable[[], object]], *, jobs: int | None = None
    ) -> None:
        self.device, self.gpu, self.step, self.jobs = device, gpu, step, jobs
        self.clock = clock_for(device)
        self.compiled: dict[Binary, str | None] = {}
        self._of: Block | None = None
        self._small: dict[int, tuple[Observed, dict[str, float]]] = {}
        self._cases: list[_Case] = []
        self._eager: Observed | None = None
        self._by_python: bool | None = None

    def rungs(self, block: Block) -> Sequence[str]:
        return list(candidates_for(block.gathered.training))

    def ready(self, block: Block, candidates: Mapping[str, Candidate]) -> dict[str, str]:
        launched = {name: gone(block, one, self.gpu).binaries for name, one in candidates.items()}
        new = dict.fromkeys(one for every in launched.values() for one in every if one not in self.compiled)
        if new:
            made = compile_ahead(new, self.gpu.target, jobs=self.jobs, limit_s=COMPILE_SECONDS)
            self.compiled.update({binary: one.error for binary, one in made.items()})
        left: dict[str, str] = {}
        for name, binaries in launched.items():
            failed = next((one for one in binaries if self.compiled[one] is not None), None)
            if failed is not None:
                left[name] = f"{failed.name}: {self.compiled[failed]}"
        return left

    def sites(self, block: Block, candidate: Candidate) -> Iterable[Seen]:
        return gone(block, candidate, self.gpu).sites

    def predicted(self, block: Block, candidate: Candidate) -> float:
        return gone(block, candidate, self.gpu).prediction.seconds

    def why_wrong(self, block: Block, candidate: Candidate) -> str | None:
        """First a few images against fp64, by the rule of the benchmarks' gate; then all of them against eager."""
        self._turn_to(block)
        try:
            why = self._against_fp64(block, candidate, DRAWS)
            if why is not None:
                why = self._against_fp64(block, candidate, MORE_DRAWS)
            return why or self._against_eager(block, candidate)
        except Exception as error:
            return self._reason(error)

    def times(self, block: Block, candidates: Mapping[str, Candidate]) -> dict[str, Timing | str]:
        self._turn_to(block)
        found: dict[str, Timing | str] = {}
        try:
            cases = self._rotated(block)
        except Exception as error:
            return dict.fromkeys(candidates, self._reason(error))

        def failed(name: str, error: Exception) -> None:
            found[name] = self._reason(error)

        plain = {name: _taking_turns(self._call(block, one), cases) for name, one in candidates.items()}
        seconds: dict[str, list[float]] = {}
        if not self._by_python:
            graphed, calls = self._graphed(block, candidates, cases, failed), len(cases)
            by_graph = interleave(graphed, self.clock, rounds=ROUNDS, warm_up=WARM_UP, turn=TURN, on_failure=failed)
            seconds = {name: [one / calls for one in taken] for name, taken in by_graph.items()}
        if self._by_python is None:
            # Decided once for a block, for all its candidates alike.
            alive = {name: step for name, step in plain.items() if name not in found}
            taken = interleave(alive, self.clock, rounds=PYTHON_ROUNDS, warm_up=WARM_UP, turn=TURN, on_failure=failed)
            self._by_python = any(
                name not in seconds or Timing.of(one).median > HOST_BOUND * Timing.of(seconds[name]).median
                for name, one in taken.items()
            )
        if self._by_python:
            alive = {name: step for name, step in plain.items() if name not in found}
            seconds = interleave(alive, self.clock, rounds=ROUNDS, warm_up=WARM_UP, turn=TURN, on_failure=failed)
        return found | {name: Timing.of(taken) for name, taken in seconds.items() if name not in found}

    def steps(self, decisions: Decisions) -> list[tuple[float, float]] | str:
        failures: dict[str, str] = {}

        def tuned() -> None:
            with entered(decisions):
                self.step["tuned"]()

        self._forget()
        found = interleave(
            {"eager": self.step["eager"], "tuned": tuned}, self.clock, rounds=STEP_ROUNDS, limit=STEP_SECONDS,
            on_failure=lambda name, error: failures.update({name: self._reason(error)}),
        )  # fmt: skip
        if "eager" in failures:
            return f"{EAGER_FAILED}{failures['eager']}"
        if failures:
            return f"tuned: {failures['tuned']}"
        return list(zip(found["eager"], found["tuned"], strict=True))

    def _reason(self, error: Exception) -> str:
        """In one line.

        Raises:
            Unusable: the device takes nothing any more.
        """
        words = "out of memory" if isinstance(error, torch.OutOfMemoryError) else " ".join(str(error).split())[:200]
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
        except RuntimeError as broken:  # an error that sticks to the process
            raise Unusable(f"{self.device}: {words}") from broken
        return f"{type(error).__name__}: {words}" if words != "out of memory" else words

    def _turn_to(self, block: Block) -> None:
        if self._of is not block:
            self._forget()
            self._of = block

    def _forget(self) -> None:
        self._of, self._small, self._cases, self._eager, self._by_python = None, {}, [], None, None
        torch.cuda.empty_cache()

    def _call(self, block: Block, candidate: Candidate) -> Callable[[_Case], Any]:
        """One call, forward and back."""
        rung, training = SCHEDULES.get(candidate.rung, EAGER), block.gathered.training
        autocast, differentiated = autocast_of(block, self.device), block.gathered.call.differentiated

        def called(case: _Case) -> tuple[Tensor, tuple[Tensor | None, ...]]:
            with entered(candidate.decisions), torch.set_grad_enabled(differentiated):
                with autocast():
                    z = run_on(case.pattern, rung, training=training)
                if case.grad is None:
                    return z, ()
                wanted = [tensor for _, tensor in _asked(case.pattern)]
                return z.detach(), torch.autograd.grad(z, wanted, case.grad, allow_unused=True)

        return called

    def _case(self, block: Block, seed: int, batch: int, dtype: torch.dtype | None = None) -> _Case:
        how: dict[str, Any] = {"images": block.site.size, "batch": batch, "dtype": dtype}
        pattern = made_real(block.gathered.pattern, self.device, seed, **how)
        if not block.gathered.call.differentiated:
            return _Case.of(pattern, None)
        z = made_real(block.gathered.result, self.device, seed + 1, name="tensor", **how)
        return _Case.of(pattern, z.detach())

    def _observed(self, block: Block, candidate: Candidate, case: _Case) -> Observed:
        """Results of one call, running statistics among them, which begin where they began at first."""
        for tensor, start in case.statistics.values():
            tensor.copy_(start)
        z, gradients = self._call(block, candidate)(case)
        outputs = {"output": z, **{name: tensor.clone() for name, (tensor, _) in case.statistics.items()}}
        named: dict[str, Tensor | None] = {}
        for (name, _), gradient in zip(_asked(case.pattern) if case.grad is not None else (), gradients, strict=True):
            if name == "x" and gradient is not None:
                outputs[OF_THE_INPUT] = gradient
            else:
                named[name] = gradient
        return Observed(outputs, named)

    def _against_fp64(self, block: Block, candidate: Candidate, draws: int) -> str | None:
        ours: dict[str, list[float]] = {}
        theirs: dict[str, list[float]] = {}
        images = min(SMALL, block.site.size)
        for i in range(draws):
            seed = SEED + 2 * i
            if i not in self._small:
                eager = Candidate(EAGER.name, Decisions())
                # Autocast leaves fp64 alone.
                exact = self._observed(block, eager, self._case(block, seed, images, torch.float64))
                rounded = self._observed(block, eager, self._case(block, seed, images))
                self._small[i] = exact, errors(rounded, exact)
            exact, eagers = self._small[i]
            observed = self._observed(block, candidate, self._case(block, seed, images))
            for name, error in errors(observed, exact).items():
                ours.setdefault(name, []).append(error)
                theirs.setdefault(name, []).append(eagers[name])
        return self._judged(block, _rms(ours), _rms(theirs), FACTOR, "fp64")

    def _against_eager(self, block: Block, candidate: Candidate) -> str | None:
        """At full size the two may be as far apart as both may be from fp64."""
        case = self._rotated(block)[0]
        if self._eager is None:
            self._eager = self._observed(block, Candidate(EAGER.name, Decisions()), case)
        found = errors(self._observed(block, candidate, case), self._eager)
        typical = {name: [one[1][name] for one in self._small.values()] for name in found}
        return self._judged(block, found, _rms(typical), FACTOR + 1, f"eager at batch {block.site.size}")

    def _judged(
        self, block: Block, ours: dict[str, float], theirs: dict[str, float], factor: float, against: str
    ) -> str | None:
        storage = block.gathered.call.dtype
        bounds = {name: allowance(name, theirs[name], storage, "block", factor) for name in ours}
        most = worst(ours, bounds)
        if ours[most] <= bounds[most]:
            return None
        return f"{most} differs from {against} by {ours[most]:.1e}, allowed {bounds[most]:.1e}"

    def _rotated(self, block: Block) -> list[_Case]:
        """Calls on operands of their own, which together do not fit twice into the L2 cache."""
        x = block.gathered.pattern.x
        calls = min(MOST_CALLS, max(2, math.ceil(2 * cache_bytes(self.device) / (x.numel() * x.element_size()))))
        while not self._cases:
            try:
                self._cases = [self._case(block, SEED + 2 * i, block.site.size) for i in range(calls)]
            except torch.OutOfMemoryError:
                if calls == 1:
                    raise
                calls //= 2
                torch.cuda.empty_cache()
        return self._cases

    def _graphed(
        self,
        block: Block,
        candidates: Mapping[str, Candidate],
        cases: Sequence[_Case],
        failed: Callable[[str, Exception], None],
    ) -> dict[str, Callable[[], object]]:
        """Each candidate's calls as one graph; without those that run, and can not be captured."""
        found: dict[str, Callable[[], object]] = {}
        pool = torch.cuda.graph_pool_handle()
        side = torch.cuda.Stream(self.device)
        for name, candidate in candidates.items():
            call = self._call(block, candidate)
            try:
                side.wait_stream(torch.cuda.current_stream(self.device))
                with torch.cuda.stream(side):
                    call(cases[0])
                torch.cuda.current_stream(self.device).wait_stream(side)
            except Exception as error:
                failed(name, error)
                continue
            graph = torch.cuda.CUDAGraph()
            try:
                # They are replayed one after the other, and nobody looks at their results: one memory serves all.
                with torch.cuda.graph(graph, pool=pool, stream=side):
                    for case in cases:
                        call(case)
            except Exception as error:
                self._reason(error)
                continue
            found[name] = graph.replay
        return found


def _asked(pattern: Any) -> Iterator[tuple[str, Tensor]]:
    """What a gradient is asked of, by name."""
    every = [("x", pattern.x), *((f"tensor {i}", tensor) for i, tensor in enumerate(pattern.tensors))]
    return ((name, tensor) for name, tensor in every if tensor is not None and tensor.requires_grad)


def _taking_turns(call: Callable[[_Case], Any], cases: Sequence[_Case]) -> Callable[[], object]:
    place = 0

    def step() -> None:
        nonlocal place
        place += 1
        call(cases[place % len(cases)])

    return step


def _rms(every: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: math.sqrt(sum(value * value for value in values) / len(values)) for name, values in every.items()}
