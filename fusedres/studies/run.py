"""A study from its setting to a table, a picture and three lines in a folder."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fusedres.cache import read_json, write_json
from fusedres.studies.study import Finding, Lab, Row, Setting, Study, Table
from fusedres.studies.training import total_steps, trained
from fusedres.train.checkpoint import differences
from fusedres.train.data import open_data
from fusedres.train.stopping import Stopping

__all__ = ["Record", "run"]


class Record:
    """What a folder holds of a study, ``NAME.json``: its setting, the rows of each seed, what was found.

    With the rows of a seed come the seconds that all threads of the process took for them; networks that were there
    took none. With all rows comes what made the last of them: the day, torch, this library's version and commit.

    Args:
        folder: of the results.
        study: whose they are.
        setting: that is asked for.
        fresh: forget what is there.

    Raises:
        ValueError: the folder holds rows of another setting, and what differs, or something else of that name.
    """

    def __init__(self, folder: Path, study: Study, setting: Setting, *, fresh: bool = False) -> None:
        self.path = folder / f"{study.name}.json"
        self.study, self.setting = study, setting
        self.rows: dict[int, list[Row]] = {}
        self.seconds: dict[int, float] = {}
        self.made: dict[str, str | None] = {}
        if not fresh and self.path.exists():
            self._read()

    def _read(self) -> None:
        try:
            held = read_json(self.path)
            old = {int(seed): [Row(*row) for row in rows] for seed, rows in held["rows"].items()}
            seconds = {int(seed): float(value) for seed, value in held.get("seconds", {}).items()}
            made = dict(held["made"])
            odd = differences(held["setting"], self.setting.as_json())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"out: {self.path} is no result of a study ({error}); --fresh begins anew") from error
        if odd:
            raise ValueError(
                f"out: {self.path} is of another setting: {'; '.join(odd)}; choose another folder, or --fresh"
            )
        self.rows, self.seconds, self.made = old, seconds, made

    def add(self, seed: int, rows: Sequence[Row], seconds: float) -> None:
        """Take the rows of a seed."""
        self.rows[seed], self.seconds[seed] = list(rows), seconds
        self.made = {
            "date": str(date.today()), "torch": torch.__version__, "fusedres": version("fusedres"), "commit": _commit(),
        }  # fmt: skip

    def save(self, finding: Finding | None = None) -> None:
        """Write it."""
        held: dict[str, Any] = {
            "study": self.study.name,
            "source": self.study.source,
            "paper": self.study.paper,
            "setting": self.setting.as_json(),
            "rows": {str(seed): rows for seed, rows in self.rows.items()},
            "seconds": {str(seed): value for seed, value in self.seconds.items()},
            "made": self.made,
        }
        if finding is not None:
            held["finding"] = finding._asdict()
        if not write_json(held, self.path):
            raise ValueError(f"out: {self.path} can not be written")


def run(
    study: Study,
    folder: Path,
    setting: Setting,
    seeds: Sequence[int],
    *,
    say: Callable[[str], None],
    device: torch.device | None = None,
    data_dir: Path = Path("data"),
    fresh: bool = False,
    wish: Stopping | None = None,
    tell: Callable[[str, int, int], None] = lambda words, done, of: None,
) -> Finding:
    """Train what a study needs, measure, and write ``NAME.csv``, ``NAME.json`` and ``NAME.png``.

    Networks and rows that the folder holds are not computed again, and a training that was interrupted goes on.

    Args:
        study: the experiment.
        folder: of the results, made if it is missing; networks are shared by the studies of a folder.
        setting: what decides on the numbers.
        seeds: means and deviations are over them.
        say: takes lines for people.
        device: trains and measures (the CPU if None).
        data_dir: where CIFAR's files lie.
        fresh: measure again; networks are kept.
        wish: stops between steps.
        tell: takes words, steps of training made and steps of all.

    Raises:
        ValueError: the folder holds results of another setting, or can not be made.
        Stopped: on a signal; the same call goes on.
    """
    record = Record(folder, study, setting, fresh=fresh)
    recipe, device = study.recipe(setting), device or torch.device("cpu")
    specs = study.networks(setting)
    count = len(open_data(setting.data, recipe.crop, root=data_dir).train.labels) if specs else 0
    try:
        (folder / "networks").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out: the folder {folder} can not be made: {error}") from error
    record.save()
    left = [seed for seed in seeds if seed not in record.rows]
    lengths = [total_steps(spec.change(recipe), count) for spec in specs]
    for i_seed, seed in enumerate(left):
        networks = {}
        started = time.process_time()
        for i, spec in enumerate(specs):
            before = i_seed * sum(lengths) + sum(lengths[:i])
            networks[spec.label] = trained(
                spec, recipe, setting.data, folder / "networks", seed=seed, fused=not setting.plain, amp=setting.amp,
                device=device, data_dir=data_dir, wish=wish or Stopping(),
                tell=lambda words, step, before=before, seed=seed: tell(  # type: ignore[misc]
                    f"{study.name}, seed {seed}, {words}", before + step, len(left) * sum(lengths)
                ),
            )  # fmt: skip
            if networks[spec.label].diverged:
                say(f"{spec.label}, seed {seed}: diverged after {len(networks[spec.label].history)} epochs")
        rows = list(study.measure(Lab(setting, seed, networks, recipe, data_dir)))
        record.add(seed, rows, time.process_time() - started)
        record.save()
    table = Table({seed: record.rows[seed] for seed in seeds})
    finding = study.found(table)
    record.save(finding)
    table.write(folder / f"{study.name}.csv")
    _draw(study, table, folder / f"{study.name}.png", say)
    say(f"paper: {study.paper} ({study.source})")
    say(f"here:  {finding.words}, {_where(setting, seeds)}")
    say(f"verdict: {finding.verdict}")
    return finding


def _commit() -> str | None:
    """Of the checkout that this file is in, with "-dirty" where it was changed; None if it is in none."""
    root = Path(__file__).parents[2]
    # Not asked of git: an installed package may well lie within a checkout, of something else.
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        told = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return told.stdout.strip() or None


def _where(setting: Setting, seeds: Sequence[int]) -> str:
    return f"{setting.data}, {len(seeds)} seed{'s' * (len(seeds) > 1)}"


def _draw(study: Study, table: Table, path: Path, say: Callable[[str], None]) -> None:
    if find_spec("matplotlib") is None:
        path.unlink(missing_ok=True)
        say("no picture: matplotlib is not installed (pip install fusedres[cli])")
        return
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    study.draw(figure, table)
    temporary = path.with_name(f"{path.name}.partial")
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)
