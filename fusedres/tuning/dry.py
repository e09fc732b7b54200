"""A candidate gone through on paper: what it launches, where something is decided in it, and what it would take."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fusedres.compiler.binary import Binary
from fusedres.patterns.choose import EAGER, gone_through
from fusedres.plan.decisions import Seen, entered
from fusedres.plan.gpus import Gpu
from fusedres.plan.schedule import SCHEDULES
from fusedres.runtime.launch import Launch
from fusedres.traffic.predict import Prediction, on_paper, prediction
from fusedres.tuning.blocks import Block
from fusedres.tuning.tuner import Candidate


@dataclass(frozen=True)
class Dry:
    """What going through a candidate told.

    Attributes:
        prediction: of its time.
        binaries: that it launches, each once.
        sites: that it consulted, each once.
    """

    prediction: Prediction
    binaries: tuple[Binary, ...]
    sites: tuple[Seen, ...]


def gone(block: Block, candidate: Candidate, gpu: Gpu) -> Dry:
    """Go through a candidate, forward and back."""
    one = block.gathered
    sites: list[Seen] = []
    rung = SCHEDULES.get(candidate.rung, EAGER)
    with entered(candidate.decisions), torch.set_grad_enabled(one.call.differentiated):
        found = on_paper(lambda: gone_through(one.pattern, rung, one.call, []), gpu, witness=sites)
    binaries = dict.fromkeys(launch.binary for launch in found if isinstance(launch, Launch))
    return Dry(prediction(found, gpu), tuple(binaries), tuple({seen.site: seen for seen in sites}.values()))
