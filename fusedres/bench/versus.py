"""``fusedres bench --compare COMMIT``: this tree and another commit of it side by side, in turns."""

from __future__ import annotations

import csv
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from fusedres.bench.rows import Key
from fusedres.bench.session import BenchOptions
from fusedres.tables import Column, Fitted

ROOT = Path(__file__).resolve().parents[2]
HERE = "here"
LISTS = ("model", "block", "op", "contenders", "dtype")
NUMBERS = ("batch", "px", "device", "rounds", "seconds", "threads")
FLAGS = ("train", "infer", "quick")
OUTPUTS = ("csv", "plot", "html", "resume", "gate_only", "list")


def run(options: BenchOptions, commit: str, tell: Callable[[str, int, int], None] = lambda *_: None) -> int:
    """Measure the working tree and ``commit``, each twice (here, there, there, here), in processes of their own.

    Returns:
        The exit status: that of a run which failed, else 0.

    Raises:
        ValueError: no such commit, no git tree, or an option that a comparison has no use for.
    """
    for name in OUTPUTS:
        if getattr(options, name):
            raise ValueError(f"compare: expected without --{name.replace('_', '-')}")
    full = _git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}")
    if not full:
        raise ValueError(f"compare: expected a commit of {ROOT}, got {commit!r}")
    there = full[:9]
    arguments = _arguments(options)
    found: dict[str, list[dict[Key, float]]] = {HERE: [], there: []}
    with _checked_out(full) as (tree, folder):
        turns = (HERE, there, there, HERE)
        for turn, name in enumerate(turns):
            tell(f"measuring {name}", turn, len(turns))
            path = folder / f"{turn}.csv"
            status, said = _bench(ROOT if name == HERE else tree, [*arguments, "--csv", str(path)])
            if not path.exists():
                print(f"{name}: {said.strip()[-2000:]}", file=sys.stderr)
                return status or 1
            found[name].append(_medians(path))
    Console(highlight=False).print(table(found))
    return 0


def table(found: Mapping[str, Sequence[Mapping[Key, float]]]) -> Fitted:
    """Milliseconds of a step in both, the medians of all turns and how far they lie apart, and the gain."""
    (here, ours), (there, theirs) = found.items()
    keys = list(dict.fromkeys(key for turn in (*ours, *theirs) for key in turn))
    seconds = {
        (name, key): [turn[key] for turn in turns if key in turn] for name, turns in found.items() for key in keys
    }

    def shown(name: str, key: Key) -> str:
        values = [1e3 * value for value in seconds[name, key]]
        return f"{statistics.median(values):.4g} ({min(values):.4g} - {max(values):.4g})" if values else "-"

    def gain(key: Key) -> str:
        pair = seconds[here, key], seconds[there, key]
        return f"{statistics.median(pair[1]) / statistics.median(pair[0]):.3f}" if all(pair) else "-"

    cases = [f"{key.case}, {key.mode}, {key.dtype}, {key.batch} x {key.px} px" for key in keys]
    return Fitted(
        f"ms a step, {here} and {there}: medians of {len(ours)} turns (least - most)",
        [
            Column("case", cases, words=True),
            Column("contender", [key.contender for key in keys], words=True),
            Column(here, [shown(here, key) for key in keys]),
            Column(there, [shown(there, key) for key in keys]),
            Column("faster by", [gain(key) for key in keys]),
        ],
    )


def _medians(path: Path) -> dict[Key, float]:
    """Seconds of a step of each row that has a time. Another commit's table may have other columns beside these."""
    with path.open(newline="") as file:
        return {
            Key(row["case"], row["mode"], row["dtype"], int(row["batch"]), int(row["px"]), row["contender"]): float(
                row["median_s"]
            )
            for row in csv.DictReader(file)
            if row["median_s"]
        }


def _arguments(options: BenchOptions) -> list[str]:
    """The same request for a command that is run elsewhere."""
    words = []
    for name in LISTS:
        if getattr(options, name):
            words += [f"--{name}", ",".join(map(_absolute, getattr(options, name)))]
    for name in NUMBERS:
        if getattr(options, name) is not None:
            words += [f"--{name}", str(getattr(options, name))]
    return words + [f"--{name}" for name in FLAGS if getattr(options, name)]


def _absolute(name: str) -> str:
    """A model of a file by the file's whole path."""
    path, colon, member = name.rpartition(":")
    return f"{Path(path).resolve()}:{member}" if colon and path.endswith(".py") else name


def _bench(tree: Path, arguments: Sequence[str]) -> tuple[int, str]:
    """Run the command of a tree; its exit status and what it said on the standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "fusedres", "bench", *arguments], cwd=tree, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(tree)},
    )  # fmt: skip
    return done.returncode, done.stderr


@contextmanager
def _checked_out(commit: str) -> Iterator[tuple[Path, Path]]:
    """A work tree of a commit, and a folder for results, both gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="fusedres-") as folder:
        tree = Path(folder) / "tree"
        _git("worktree", "add", "--detach", str(tree), commit)
        try:
            yield tree, Path(folder)
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*words: str) -> str:
    """What git says of this tree; nothing where it fails."""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
