"""The order in which things are measured, and what is concluded: pure logic over a `Workbench` that measures.

For each kind of call its rungs, then what the fastest rung chooses inside, then the whole step, whose blocks go back to
eager PyTorch until it is not slower than eager PyTorch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fusedres.measure.timing import Timing
from fusedres.patterns.choose import EAGER
from fusedres.plan.decisions import Decisions, Seen, Site, written
from fusedres.runtime.plans import Plan

# A rung whose inside is looked at takes at most this many times as long as eager PyTorch.
WORTH_TUNING = 1.5
# Of a site's options those are tried which are predicted to be the fastest, and none that are this much slower.
MOST_TRIED, FAR_SLOWER = 3, 1.25
# What is faster by less than this has not been seen to be faster.
LEAST_GAIN = 0.01
# A step whose median is slower by more than this is slower, however much its times spread.
SLOWER = 0.01
# Who ended the process while it was tried is left out after so many times.
MOST_ENDS = 2
PRESENT = "present"
UNDER_WAY = ("changed", "trying")
"""What is noted of a block until it is done."""


class Tuned(Protocol):
    """A kind of call."""

    @property
    def site(self) -> Site: ...

    @property
    def title(self) -> str: ...

    @property
    def count(self) -> int:
        """How often a step makes it."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A rung, and what is decided inside."""

    rung: str
    decisions: Decisions


class Workbench(Protocol):
    """Something that measures."""

    def rungs(self, block: Any) -> Sequence[str]:
        """What a block could run on."""

    def ready(self, block: Any, candidates: Mapping[str, Candidate]) -> dict[str, str]:
        """Compile what candidates launch; of those that do not compile, why."""

    def why_wrong(self, block: Any, candidate: Candidate) -> str | None:
        """Why a candidate's numbers are not to be trusted, or None."""

    def times(self, block: Any, candidates: Mapping[str, Candidate]) -> dict[str, Timing | str]:
        """Seconds of each, which took turns; or why one has none."""

    def sites(self, block: Any, candidate: Candidate) -> Iterable[Seen]:
        """Where something is decided in a candidate."""

    def predicted(self, block: Any, candidate: Candidate) -> float:
        """Seconds that a candidate is thought to take."""

    def steps(self, decisions: Decisions) -> list[tuple[float, float]] | str:
        """Seconds of the whole step, eager and with these decisions, of each round in which both took turns; or why
        there are none: of eager ones first."""


class Unusable(RuntimeError):
    """The device takes nothing any more; what was found until then is kept."""


def key_of(site: Site) -> str:
    """What a block's findings are kept by."""
    return f"{site.what} @{site.size}"


def measured(ms: Mapping[str, float]) -> str:
    """The fastest."""
    return min(ms, key=lambda name: ms[name])


def _with_choice(candidate: Candidate, site: Site, option: Any) -> Candidate:
    """The same candidate, where a site takes an option."""
    decisions = candidate.decisions.copy()
    decisions.put(site, written(option))
    return Candidate(candidate.rung, decisions)


def _name(site: Site, option: Any) -> str:
    return f"{site.what}: {written(option)}"


class Tuner:
    """Tunes blocks, and then the step that they are of.

    Args:
        workbench: measures.
        plan: what is known already, which grows.
        keep: is called when something was found that is worth to be kept.
        say: is told, for people, what is done: the block's number, and words.
        inside: whether to look at what rungs choose inside.
    """

    def __init__(
        self,
        workbench: Workbench,
        plan: Plan,
        *,
        keep: Callable[[], None] = lambda: None,
        say: Callable[[int, str], None] = lambda place, words: None,
        inside: bool = True,
    ) -> None:
        self.workbench, self.plan, self.keep, self.say, self.inside = workbench, plan, keep, say, inside
        # Sites of other models' blocks are not gone through again either.
        self.seen = {site for entry in plan.blocks.values() for site in entry.get("sites", {})}

    def tune(self, blocks: Sequence[Tuned]) -> None:
        """Blocks one after the other; those that are done already are not done again."""
        for place, block in enumerate(blocks):
            self._block(place, block)

    def entry(self, block: Tuned) -> dict[str, Any]:
        """What is known of a block."""
        return self.plan.blocks.setdefault(
            key_of(block.site),
            {"title": block.title, "count": block.count, "batch": block.site.size, "left_out": {}, "sites": {}},
        )

    def gained(self, blocks: Iterable[Tuned]) -> tuple[float, float]:
        """Milliseconds of eager blocks, and what is gained of them, in a step, as far as blocks are done."""
        eager = gained = 0.0
        for block in blocks:
            entry = self.entry(block)
            if entry.get("done") and EAGER.name in entry["ms"]:
                eager += entry["ms"][EAGER.name] * block.count
                gained += (entry["ms"][EAGER.name] - entry["ms"][entry["rung"]]) * block.count
        return eager, gained

    def _block(self, place: int, block: Tuned) -> None:
        entry = self.entry(block)
        entry["title"], entry["count"] = block.title, block.count
        if entry.get("done"):
            return
        if "ms" not in entry:
            self.say(place, f"{block.title}: rungs")
            base = self.plan.decisions.copy()
            rungs = {name: Candidate(name, base) for name in self.workbench.rungs(block)}
            times = self._times(block, entry, rungs)
            entry["ms"] = {name: timing.median * 1e3 for name, timing in times.items()}
            entry["spread"] = {name: [timing.low * 1e3, timing.high * 1e3] for name, timing in times.items()}
            self.keep()
        ms: dict[str, float] = entry["ms"]
        fused = {name: time for name, time in ms.items() if name != EAGER.name}
        best = measured(fused) if fused else None
        if best is not None and self.inside and fused[best] <= WORTH_TUNING * ms.get(EAGER.name, math.inf):
            self._inside(place, block, entry, best)
        # Eager PyTorch needs no plan, and stands where nothing could be timed.
        entry["rung"] = entry["fastest"] = measured(ms) if ms else EAGER.name
        entry["done"] = True
        for own in UNDER_WAY:
            entry.pop(own, None)
        self._decide(block, entry)
        self.keep()

    def _decide(self, block: Tuned, entry: Mapping[str, Any]) -> None:
        choice = {"rung": entry["rung"], "ms": dict(entry["ms"]), "batch": block.site.size}
        self.plan.decisions.put(block.site, choice)

    def _inside(self, place: int, block: Tuned, entry: dict[str, Any], rung: str) -> None:
        """What a rung chooses inside, one site after the other; all of it together is held against none of it."""
        # As lists, which a file holds: an interrupted tuning goes on.
        changed: list[list[Any]] = entry.setdefault("changed", [])
        trials: dict[Site, list[Any]] = {}
        while True:
            present = Candidate(rung, self.plan.decisions.copy())
            sites = [one for one in self.workbench.sites(block, present) if self._is_open(one)]
            if not sites:
                break
            new = {one.site: self._worth_trying(block, present, one) for one in sites if one.site not in trials}
            if new:  # compiled all at once, which takes as long as a few of them
                self.say(place, f"{block.title}, {rung}: compiling")
                trials |= new
                every = [(site, option) for site, options in new.items() for option in options]
                self.workbench.ready(block, {_name(*one): _with_choice(present, *one) for one in every})
            found = sites[0]
            self.say(place, f"{block.title}, {rung}: {found.site.what.partition(' (')[0].strip('_')}")
            told = self._site(block, entry, present, found, trials[found.site])
            if told is not None:
                changed.append([*found.site])
            name = key_of(found.site)
            entry["sites"][name] = told or "as it was"
            self.seen.add(name)
            self.keep()
        if changed:
            untuned = self.plan.decisions.copy()
            for site in changed:
                untuned.drop(Site(*site))
            trial = {"before": Candidate(rung, untuned), rung: Candidate(rung, self.plan.decisions.copy())}
            if EAGER.name in entry["ms"]:
                trial[EAGER.name] = Candidate(EAGER.name, untuned)
            times = self._times(block, entry, trial, trusted={"before"})
            if rung in times and times[rung].median < times.get("before", times[rung]).median:
                entry["untuned_ms"] = entry["ms"][rung]
                self._timed(entry, times, (rung, EAGER.name))
            elif "before" in times:  # what was gained one by one is not there together
                for site in changed:
                    self.plan.decisions.drop(Site(*site))
                    entry["sites"][key_of(Site(*site))] = "as it was, after all"
                self._timed(entry, {**times, rung: times["before"]}, (rung, EAGER.name))

    def _timed(self, entry: dict[str, Any], times: Mapping[str, Timing], names: Iterable[str]) -> None:
        for name in names:
            if name in times:
                entry["ms"][name] = times[name].median * 1e3
                entry["spread"][name] = [times[name].low * 1e3, times[name].high * 1e3]

    def _is_open(self, seen: Seen) -> bool:
        sizes = self.plan.decisions.entries[seen.site.kind].get(seen.site.what, {})
        return len(seen.options) > 1 and seen.site.size not in sizes and key_of(seen.site) not in self.seen

    def _worth_trying(self, block: Tuned, present: Candidate, seen: Seen) -> list[Any]:
        """Options of a site that are predicted to be fast enough."""
        now = self._taken(present, seen)
        thought = [
            (self.workbench.predicted(block, _with_choice(present, seen.site, option)), option)
            for option in seen.options
            if written(option) != now
        ]
        limit = FAR_SLOWER * self.workbench.predicted(block, present)
        return [option for time, option in sorted(thought, key=lambda one: one[0]) if time <= limit][:MOST_TRIED]

    def _taken(self, present: Candidate, seen: Seen) -> Any:
        decided = present.decisions.find(seen.site)
        return written(seen.options[0]) if decided is None else decided

    def _site(
        self, block: Tuned, entry: dict[str, Any], present: Candidate, seen: Seen, options: Sequence[Any]
    ) -> str | None:
        """Decide for a site; what was changed, or None."""
        if not options:
            return None
        others = {_name(seen.site, option): _with_choice(present, seen.site, option) for option in options}
        times = self._times(block, entry, {PRESENT: present, **others}, trusted={PRESENT})
        ms = {name: timing.median for name, timing in times.items()}
        if PRESENT not in ms:
            return None
        best = measured(ms)
        if ms[best] >= (1 - LEAST_GAIN) * ms[PRESENT]:
            return None
        choice = others[best].decisions.find(seen.site)
        self.plan.decisions.put(seen.site, choice)
        return f"{self._taken(present, seen)} -> {choice}, {ms[PRESENT] * 1e3:.4g} -> {ms[best] * 1e3:.4g} ms"

    def _times(
        self,
        block: Tuned,
        entry: dict[str, Any],
        candidates: Mapping[str, Candidate],
        trusted: Iterable[str] = (),
    ) -> dict[str, Timing]:
        """Times of all that compile, launch and agree; why others do not is noted."""
        ends: dict[str, int] = entry.setdefault("trying", {})
        left = {name: "it ended the process" for name in candidates if ends.get(name, 0) >= MOST_ENDS}
        left |= self.workbench.ready(block, {name: one for name, one in candidates.items() if name not in left})
        for name, candidate in candidates.items():
            if name in left or name == EAGER.name or name in trusted:
                continue
            with _Trying(self, ends, name):
                why = self.workbench.why_wrong(block, candidate)
            if why is not None:
                left[name] = why
        kept = {name: candidate for name, candidate in candidates.items() if name not in left}
        found: dict[str, Timing] = {}
        for name, timing in (self.workbench.times(block, kept) if kept else {}).items():
            if isinstance(timing, str):
                left[name] = timing
            else:
                found[name] = timing
        entry["left_out"].update(left)
        return found

    def whole_step(self, title: str, blocks: Sequence[Tuned]) -> dict[str, Any]:
        """Hold the step against eager PyTorch's, and take back what gains least until it is not slower.

        Returns:
            what was found, as it is kept in the plan.
        """
        back: list[str] = []
        while True:
            self.say(len(blocks), "the whole step, eager and tuned by turns")
            rounds = self.workbench.steps(self.plan.decisions.copy())
            fused = [block for block in blocks if self.entry(block)["rung"] != EAGER.name]
            if not fused or not _slower(rounds):
                break
            least = min(fused, key=self._margin)
            entry = self.entry(least)
            entry["rung"] = EAGER.name
            self._decide(least, entry)
            back.append(least.title)
            self.keep()
        found: dict[str, Any] = {"back": back, "blocks": [key_of(block.site) for block in blocks]}
        if isinstance(rounds, str):
            found["failed"] = rounds
        else:
            eager, tuned = (Timing.of([one[side] for one in rounds]) for side in (0, 1))
            for name, timing in (("eager", eager), ("tuned", tuned)):
                found[f"{name}_ms"] = [1e3 * value for value in (timing.low, timing.median, timing.high)]
            found["rounds"] = len(rounds)
        self.plan.steps[title] = found
        self.keep()
        return found

    def _margin(self, block: Tuned) -> float:
        """What a step gains by a block."""
        ms = self.entry(block)["ms"]
        rung = self.entry(block)["rung"]
        return float((ms.get(EAGER.name, math.inf) - ms[rung]) * block.count)


EAGER_FAILED = "eager: "


def _slower(rounds: list[tuple[float, float]] | str) -> bool:
    """Whether the tuned step is slower beyond the spread, or does not run where the eager one does."""
    if isinstance(rounds, str):
        return not rounds.startswith(EAGER_FAILED)
    # Both took turns in each round, so that what slows the machine down for a while slows both down.
    ratio = Timing.of([tuned / eager for eager, tuned in rounds])
    return ratio.low > 1 or ratio.median > 1 + SLOWER


class _Trying:
    """Something that might end the process is tried: that it was, is on the disk while it is."""

    def __init__(self, tuner: Tuner, ends: dict[str, int], name: str) -> None:
        self.tuner, self.ends, self.name = tuner, ends, name

    def __enter__(self) -> None:
        self.ends[self.name] = self.ends.get(self.name, 0) + 1
        self.tuner.keep()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, Unusable):  # and so will it be the next time
            self.ends[self.name] = MOST_ENDS
            self.tuner.keep()
            return
        self.ends.pop(self.name, None)
