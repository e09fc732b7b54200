"""A workbench whose times are made up, and known."""

import random
from dataclasses import dataclass

from fusedres.measure.timing import Timing
from fusedres.patterns.choose import EAGER
from fusedres.plan.decisions import BLOCK, TILE, WAY, Decisions, Seen, Site
from fusedres.plan.gpus import GPUS
from fusedres.runtime.plans import Plan

RUNGS = ("eager", "block_end", "stats", "prologue", "moments")


@dataclass(frozen=True)
class FakeBlock:
    title: str
    count: int = 1
    batch: int = 64

    @property
    def site(self):
        return Site(BLOCK, self.title, self.batch)


class Killed(BaseException):
    """The process ends here, as by kill -9: nothing after it is done."""


class FakeBench:
    """Times are drawn from ``seed``: of every rung, of every option of sites inside, and of what a whole step adds.

    Attributes:
        calls: what was measured, in order.
        at: tells of every measurement before it is made; may raise.
    """

    def __init__(self, blocks, seed=0, *, noise=0.0, interference=0.0, sites=2, at=lambda what: None):
        draw = random.Random(seed)
        self.blocks, self.noise, self.at, self.calls = list(blocks), noise, at, []
        self.base = {(b.title, r): draw.uniform(0.2, 3) for b in self.blocks for r in RUNGS}
        self.extra = {b.title: draw.uniform(0, interference) for b in self.blocks}
        self.inside = {
            (b.title, r): [
                (Seen(Site((WAY, TILE)[i % 2], f"{b.title} {r} {i}", b.batch), ("first", "second", "third")))
                for i in range(sites)
            ]
            for b in self.blocks
            for r in RUNGS[1:]
        }
        every = [
            (seen.site.what, option) for sites in self.inside.values() for seen in sites for option in seen.options
        ]
        self.factor = {one: draw.uniform(0.7, 1.4) for one in every}
        self.wrong, self.broken, self.unready, self.step_fails = {}, {}, {}, None
        self.noises = random.Random(seed + 1)

    def seconds(self, block, rung, decisions):
        time = self.base[block.title, rung]
        for seen in self.inside.get((block.title, rung), ()):
            time *= self.factor[seen.site.what, decisions.find(seen.site) or "first"]
        return time * 1e-3

    def _noisy(self, time):
        return time * self.noises.lognormvariate(0, self.noise)

    def rungs(self, block):
        return RUNGS

    def ready(self, block, candidates):
        self.at(f"ready {block.title}")
        return {name: self.unready[one.rung] for name, one in candidates.items() if one.rung in self.unready}

    def why_wrong(self, block, candidate):
        self.at(f"check {block.title} {candidate.rung}")
        return self.wrong.get(candidate.rung)

    def times(self, block, candidates):
        self.at(f"times {block.title}")
        self.calls.append((block.title, tuple(candidates)))
        found = {}
        for name, one in candidates.items():
            if one.rung in self.broken:
                found[name] = self.broken[one.rung]
            else:
                found[name] = Timing.of([self._noisy(self.seconds(block, one.rung, one.decisions)) for _ in range(5)])
        return found

    def sites(self, block, candidate):
        return self.inside.get((block.title, candidate.rung), ())

    def predicted(self, block, candidate):
        return self.seconds(block, candidate.rung, candidate.decisions)

    def step_seconds(self, decisions):
        """What the whole step takes: eager, and with decisions, which add what nobody sees in a block alone."""
        none, eager, tuned = Decisions(), 0.0, 0.0
        for block in self.blocks:
            alone = block.count * self.seconds(block, EAGER.name, none)
            rung = (decisions.find(block.site) or {"rung": EAGER.name})["rung"]
            eager += alone
            inside = block.count * self.seconds(block, rung, decisions) + self.extra[block.title] * 1e-3
            tuned += alone if rung == EAGER.name else inside
        return eager, tuned

    def steps(self, decisions):
        self.at("steps")
        if self.step_fails is not None:
            return self.step_fails
        eager, tuned = self.step_seconds(decisions)
        return [(self._noisy(eager), self._noisy(tuned)) for _ in range(9)]


def empty_plan():
    gpu = GPUS["h100"]
    return Plan(gpu.name, gpu.multiprocessors, "NVIDIA H100", {"fusedres": "1"})
