"""Plans on disk: what was measured on this machine's GPUs, and which of it holds for a call.

A plan is one JSON file for a GPU and the versions that it was measured with, in the folder ``plans`` of the cache. It
is written whole or not at all. What can not be read is set aside, said once, and done without.
"""

from __future__ import annotations

import datetime
import fcntl
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fusedres.cache import cache_folder, read_json, say_once, set_aside, slug, write_json
from fusedres.compiler.targets import triton
from fusedres.context import here
from fusedres.plan.decisions import KINDS, Decisions
from fusedres.plan.gpus import GPUS, Gpu

FORMAT = 1
SHIPPED = Path(__file__).parents[1] / "plan" / "shipped"


class NotAPlan(ValueError):
    """A file that is no plan, or none of this format."""


@dataclass
class Plan:
    """What was decided for one GPU.

    Attributes:
        gpu: what its `Gpu` is called; ``multiprocessors`` are its own.
        title: PyTorch's name of the device.
        made_with: versions by name.
        measured: whether it was, and not predicted.
        decisions: for blocks, ways and tiles.
        blocks: of the last tuning of each block, what was found: a table for people.
        steps: of each model that was tuned, its whole step, eager and tuned.
        date: of the last change, ISO 8601.
    """

    gpu: str
    multiprocessors: int
    title: str
    made_with: dict[str, str]
    measured: bool = True
    decisions: Decisions = field(default_factory=Decisions)
    blocks: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    date: str = ""

    @classmethod
    def of(cls, gpu: Gpu, *, measured: bool = True) -> Plan:
        """An empty one for a GPU and the versions that are installed."""
        title = gpu.title
        if measured and torch.cuda.is_available():
            title = torch.cuda.get_device_name()
        return cls(gpu.name, gpu.multiprocessors, title, versions(measured=measured), measured)

    @property
    def words(self) -> str:
        """Where its choices come from."""
        day = self.date[:10]
        return f"measured on {self.title}, {day}" if self.measured else f"predicted for {self.gpu}"

    def why_not(self, gpu: Gpu) -> str | None:
        """Why it says nothing of a GPU on this machine, or None."""
        if (self.gpu, self.multiprocessors) != (gpu.name, gpu.multiprocessors):
            return (
                f"it is of {self.title} with {self.multiprocessors} multiprocessors, and this is {gpu.name} with "
                f"{gpu.multiprocessors}"
            )
        now = versions(measured=self.measured)
        differing = [name for name in now if self.made_with.get(name) != now[name]]
        if differing:
            told = ", ".join(f"{name} {self.made_with.get(name)}, here {now[name]}" for name in differing)
            return f"it was made with {told}"
        return None

    def add(self, other: Plan) -> None:
        """Take over what another of the same GPU holds, the newer of what both have."""
        mine, theirs = (self, other) if self.date <= other.date else (other, self)
        both = mine.decisions.copy()
        both.add(theirs.decisions)
        self.decisions = both
        self.blocks = {**mine.blocks, **theirs.blocks}
        self.steps = {**mine.steps, **theirs.steps}
        self.date = max(self.date, other.date)
        self.decisions.origin = self.words

    def as_json(self) -> dict[str, Any]:
        return {
            "fusedres plan": FORMAT,
            "gpu": {"name": self.gpu, "multiprocessors": self.multiprocessors, "title": self.title},
            "made_with": self.made_with,
            "measured": self.measured,
            "date": self.date,
            "decisions": self.decisions.entries,
            "blocks": self.blocks,
            "steps": self.steps,
        }

    @classmethod
    def of_json(cls, read: Any) -> Plan:
        """The opposite of `as_json`.

        Raises:
            NotAPlan: it is none.
        """
        if not isinstance(read, dict) or "fusedres plan" not in read:
            raise NotAPlan('expected a JSON object with "fusedres plan"')
        if read["fusedres plan"] != FORMAT:
            raise NotAPlan(f"expected format {FORMAT}, got {read['fusedres plan']!r}")
        try:
            gpu = read["gpu"]
            entries = {
                kind: {
                    str(what): {int(size): _choice(kind, choice) for size, choice in sizes.items()}
                    for what, sizes in read["decisions"].get(kind, {}).items()
                }
                for kind in KINDS
            }
            made_with = {str(name): str(value) for name, value in read["made_with"].items()}
            blocks, steps = (
                {str(key): dict(value) for key, value in read[part].items()} for part in ("blocks", "steps")
            )
            plan = cls(
                str(gpu["name"]), int(gpu["multiprocessors"]), str(gpu["title"]), made_with, bool(read["measured"]),
                Decisions(entries, measured=bool(read["measured"])), blocks, steps, str(read["date"]),
            )  # fmt: skip
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise NotAPlan(f"{type(error).__name__}: {error}") from error
        plan.decisions.origin = plan.words
        return plan


def _choice(kind: str, choice: Any) -> Any:
    """A choice as it stands in a file, which a person may have written.

    Raises:
        TypeError: it is none.
    """
    if kind == "block":
        if not isinstance(choice, dict) or not isinstance(choice.get("rung"), str):
            raise TypeError(f"a block's choice has a rung, got {choice!r}")
    elif not isinstance(choice, str | dict):
        raise TypeError(f"expected a name or numbers by name, got {choice!r}")
    elif isinstance(choice, dict) and any(type(value) is not int or value < 0 for value in choice.values()):
        raise TypeError(f"a tile has whole numbers, got {choice!r}")
    return choice


def versions(*, measured: bool = True) -> dict[str, str]:
    """What a plan depends on besides its GPU; a predicted one, on fusedres alone."""
    try:
        own = version("fusedres")
    except PackageNotFoundError:  # a source tree that was never installed
        own = "0+unknown"
    if not measured:
        return {"fusedres": own}
    runtime = ("hip", torch.version.hip) if torch.version.hip else ("cuda", torch.version.cuda)
    return {
        "fusedres": own, "torch": torch.__version__, "triton": str(getattr(triton, "__version__", None)),
        runtime[0]: str(runtime[1]), "driver": _driver(),
    }  # fmt: skip


# What the kernel's modules of the vendors say of themselves.
DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version"))


@functools.cache
def _driver() -> str:
    """The driver's version, or an empty string where it tells none."""
    for path in DRIVERS:
        try:
            found = re.search(r"\d+(\.\d+)+", path.read_text())
        except OSError:
            continue
        if found:
            return found[0]
    return ""


def folder() -> Path:
    """Where plans are."""
    return cache_folder() / "plans"


def path_for(gpu: Gpu) -> Path:
    """Of the plan of a GPU of this machine."""
    return _path(gpu.name, gpu.multiprocessors, versions())


def _path(gpu: str, multiprocessors: int, made_with: Mapping[str, str]) -> Path:
    told = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:8]
    return folder() / f"{slug(gpu)}-{multiprocessors}-{told}.json"


def read(path: Path) -> Plan:
    """The plan in a file.

    Raises:
        NotAPlan: it holds none.
        OSError: it can not be read.
    """
    try:
        told = read_json(path)
    except ValueError as error:
        raise NotAPlan(str(error)) from error
    return Plan.of_json(told)


def read_or_set_aside(path: Path) -> Plan | None:
    """The same; None where there is no file, or where there is no plan in it: it is renamed then, and that is said."""
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except NotAPlan as error:
        where = set_aside(path)
        say_once(f"the plan {path} is not used ({error}) and was {where}; fusedres tune makes it anew")
    except OSError as error:
        say_once(f"the plan {path} can not be read ({error.strerror}) and is not used")
    return None


def write(plan: Plan, path: Path, *, date: str | None = None) -> bool:
    """Write a plan, of now or of another date, whole or not at all; False, said once, where the disk does not take
    it."""
    plan.date = date or datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    plan.decisions.origin = plan.words
    return write_json(plan.as_json(), path)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Inside the ``with`` block this process alone has the lock of a file; gives whether another one had it before.

    Where locks can not be had, as in a folder that can not be written, nobody waits.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_suffix(".lock").open("a")
    except OSError:
        yield False
        return
    with file:
        waited = False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = True
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield waited  # closing the file gives the lock back


# By GPU: what this process goes by where nothing else is said; None: there is none.
_defaults: dict[tuple[str, int], Plan | None] = {}
_shipped: dict[str, Plan | None] = {}


def default_for(gpu: Gpu) -> Plan | None:
    """The plan of a GPU that this user has measured, read once."""
    key = gpu.name, gpu.multiprocessors
    if key not in _defaults:
        found = read_or_set_aside(path_for(gpu))
        why = None if found is None else found.why_not(gpu)
        if found is not None and why is not None:  # a file that somebody has put there under this name
            say_once(f"the plan {path_for(gpu)} is not used: {why}")
            found = None
        _defaults[key] = found
    return _defaults[key]


def set_default(gpu: Gpu, plan: Plan | None) -> None:
    """Go by ``plan`` from now on, in place of what a file says."""
    _defaults[gpu.name, gpu.multiprocessors] = plan


def forget() -> None:
    """Let files be read anew."""
    _defaults.clear()


def shipped_for(gpu: Gpu) -> Plan | None:
    """The predicted plan that comes with the package, for a GPU as its data sheet has it."""
    if gpu.name not in _shipped:
        path = SHIPPED / f"{gpu.name}.json"
        found = read(path) if gpu.name in GPUS and path.exists() else None
        if found is not None:
            found.decisions.exact = True
        _shipped[gpu.name] = found
    # Of a GPU whose figures were measured, what is predicted is another thing.
    return _shipped[gpu.name] if GPUS.get(gpu.name) == gpu else None


@dataclass(frozen=True, eq=False)
class Chosen:
    """A plan that `fuse` was given for a model, and where it is from."""

    plan: Plan
    path: str


def for_call(gpu: Gpu) -> Decisions | None:
    """What a call on a GPU goes by: what its thread has entered, the plan of its model, or the user's for that GPU."""
    now = here()
    if now.decisions is not None:
        own: Decisions = now.decisions
        return own
    chosen: Chosen | None = now.plan
    if chosen is not None:
        why = chosen.plan.why_not(gpu)
        if why is None:
            return chosen.plan.decisions
        say_once(f"the plan {chosen.path} is not used: {why}")
    plan = default_for(gpu)
    return None if plan is None else plan.decisions


def chosen_plan(path: str | os.PathLike[str]) -> Chosen:
    """A plan that somebody names.

    Raises:
        ValueError: there is no such file, or no plan in it.
    """
    try:
        return Chosen(read(Path(path)), os.fspath(path))
    except OSError as error:
        raise ValueError(f"plan: expected a file that fusedres tune wrote, got {path}: {error.strerror}") from error
    except NotAPlan as error:
        raise ValueError(f"plan: expected a file that fusedres tune wrote, got {path}: {error}") from error


def plans_here() -> Mapping[Path, Plan | None]:
    """Every plan in the folder, by file; None: no plan is in it."""
    found: dict[Path, Plan | None] = {}
    for path in sorted(folder().glob("*.json")):
        try:
            found[path] = read(path)
        except (NotAPlan, OSError):
            found[path] = None
    return found


def merge(files: Sequence[Path]) -> list[Path]:
    """Take over what other plans hold into those of this user, each into that of its GPU and versions.

    Returns:
        the files that were written.

    Raises:
        ValueError: a file is no plan, or a predicted one; nothing has been written then.
        OSError: a plan can not be written.
    """
    given = [(path, chosen_plan(path).plan) for path in files]
    for path, plan in given:
        if not plan.measured:
            raise ValueError(f"merge: expected plans that were measured, got {path}, which is {plan.words}")
    done: list[Path] = []
    for _, plan in given:
        path = _path(plan.gpu, plan.multiprocessors, plan.made_with)
        with locked(path):
            known = read_or_set_aside(path)
            if known is not None:
                known.add(plan)
            date = (known or plan).date
            if not write(known or plan, path, date=date):
                raise OSError(f"{path} can not be written")
        done.append(path)
    forget()
    return list(dict.fromkeys(done))
