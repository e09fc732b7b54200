"""The workbench that a data sheet is: nothing runs, and times are those that the model of time predicts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from fusedres.compiler.binary import Binary
from fusedres.measure.timing import Timing
from fusedres.patterns.choose import EAGER, candidates_for
from fusedres.plan.decisions import Decisions, Seen
from fusedres.plan.gpus import Gpu
from fusedres.tuning import device
from fusedres.tuning.blocks import Block
from fusedres.tuning.dry import gone
from fusedres.tuning.tuner import Candidate

# Of one binary on one core of a server, and cores that a machine with such a GPU has.
COMPILE_SECONDS, CORES = 3.0, 16
# A candidate is captured, and held against fp64 and eager: so many times the work of one call, and host time.
CHECKS, CHECK_SECONDS = 12, 0.05


class Paper:
    """A `Workbench` on paper, which also reckons what measuring on the GPU would take.

    Attributes:
        candidates: that would be measured.
        binaries: that would be compiled.
        seconds: that all of it would take.
    """

    def __init__(self, gpu: Gpu, blocks: Sequence[Block]) -> None:
        self.gpu, self.blocks = gpu, blocks
        self.candidates = 0
        self.binaries: set[Binary] = set()
        self.timed: set[Block] = set()
        self.seconds = 0.0

    def rungs(self, block: Block) -> Sequence[str]:
        return list(candidates_for(block.gathered.training))

    def ready(self, block: Block, candidates: Mapping[str, Candidate]) -> dict[str, str]:
        new = {binary for one in candidates.values() for binary in gone(block, one, self.gpu).binaries} - self.binaries
        self.binaries |= new
        self.seconds += COMPILE_SECONDS * math.ceil(len(new) / CORES)
        return {}

    def why_wrong(self, block: Block, candidate: Candidate) -> str | None:
        self.seconds += CHECK_SECONDS + CHECKS * self.predicted(block, candidate)
        return None

    def times(self, block: Block, candidates: Mapping[str, Candidate]) -> dict[str, Timing | str]:
        found: dict[str, Timing | str] = {}
        for name, candidate in candidates.items():
            time = self.predicted(block, candidate)
            turns = device.ROUNDS + device.WARM_UP + (block not in self.timed) * (device.PYTHON_ROUNDS + device.WARM_UP)
            self.candidates += 1
            self.seconds += turns * max(device.TURN, time)
            found[name] = Timing(time, time, time, 1)
        self.timed.add(block)
        return found

    def sites(self, block: Block, candidate: Candidate) -> Iterable[Seen]:
        return gone(block, candidate, self.gpu).sites

    def predicted(self, block: Block, candidate: Candidate) -> float:
        return gone(block, candidate, self.gpu).prediction.seconds

    def steps(self, decisions: Decisions) -> list[tuple[float, float]] | str:
        """Of the blocks alone."""
        eager = tuned = 0.0
        for block in self.blocks:
            choice = decisions.find(block.site)
            eager += block.count * self.predicted(block, Candidate(EAGER.name, decisions))
            tuned += block.count * self.predicted(block, Candidate(choice["rung"], decisions))
        self.seconds += device.STEP_ROUNDS * (eager + tuned)
        return [(eager, tuned)]
