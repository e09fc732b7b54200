"""`make gpu`: kernels checked, ResNet-50 tuned, its launches timed beside their predictions, the headline; then tests,
parity of whole networks, benchmarks; and a summary of all of it.

    python -m fusedres.bench.gpu                    # what is missing of it, essential parts first
    python -m fusedres.bench.gpu --essential        # eight minutes
    python -m fusedres.bench.gpu --parts headline,kernels --fresh
    python -m fusedres.bench.gpu --dry              # every step on an emulated GPU, to see that this script works

Parts stand on their own: one that fails or takes too long does not keep the others from running, and one that passed
is not run again for the same commit unless ``--fresh`` says so. Results lie in bench/results/<gpu>/.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

import torch

from fusedres.bench import summary
from fusedres.bench.cases import near
from fusedres.bench.declared import target_for
from fusedres.bench.machine import machine
from fusedres.bench.parts import Outcome, Part, dry_parts, real_parts
from fusedres.bench.setting import Device, device_named
from fusedres.runtime.devices import gpus

__all__ = ["Runner", "main"]

ROOT = Path(__file__).resolve().parents[2]
DRY_DEVICE = "vgpu:sm_90"
PASSED, FAILED, TIMED_OUT, LEFT_OUT, INTERRUPTED = "passed", "failed", "timed out", "left out", "interrupted"
# `fusedres bench` returns it where a contender broke the GPU's context, and a new process can go on.
DEVICE_LOST, MOST_RESTARTS = 3, 5
PATIENCE = 20.0  # seconds that a part has for writing what it has, when its time is over


class Runner:
    """Runs parts one after the other and keeps account of them in ``out``/parts.json."""

    def __init__(self, out: Path, commit: str, environment: dict[str, str], *, fresh: bool = False) -> None:
        self.out, self.commit, self.fresh = out, commit, fresh
        self.environment = os.environ | environment
        self.account = out / "parts.json"
        self.outcomes: dict[str, Outcome] = {}
        if self.account.exists():
            known = json.loads(self.account.read_text())
            self.outcomes = {name: Outcome(**values) for name, values in known.items()}

    def run(self, parts: Sequence[Part]) -> bool:
        """Run those that have not passed at this commit; whether none of ``parts`` has failed."""
        for part in parts:
            before = self.outcomes.get(part.name)
            same = not self.fresh and self.same_code(before)
            if before is not None and same and before.status == PASSED:
                print(f"{part.name}: passed before, {before.date}", flush=True)
                continue
            print(f"{part.name}: {part.what} (at most {part.limit} s)", flush=True)
            start = time.monotonic()
            self.note(part, INTERRUPTED, "", 0.0)
            status, reason = self.attempt(part, resume=same)
            self.note(part, status, reason, time.monotonic() - start)
            print(f"{part.name}: {status} after {time.monotonic() - start:.0f} s {reason}".rstrip(), flush=True)
        return all(self.outcomes[part.name].status in (PASSED, LEFT_OUT) for part in parts)

    def same_code(self, before: Outcome | None) -> bool:
        """Whether an earlier attempt ran what would run now; a commit with a + has changes that nobody knows."""
        return before is not None and before.commit == self.commit and not self.commit.endswith("+")

    def note(self, part: Part, status: str, reason: str, seconds: float) -> None:
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.outcomes[part.name] = Outcome(status, reason, round(seconds, 1), self.commit, date)
        replacement = self.account.with_suffix(".new")
        replacement.write_text(json.dumps({name: asdict(one) for name, one in self.outcomes.items()}, indent=1) + "\n")
        replacement.replace(self.account)

    def attempt(self, part: Part, *, resume: bool) -> tuple[str, str]:
        """Status and reason; output goes to the part's log."""
        missing = part.why_not()
        if missing is not None:
            return LEFT_OUT, missing
        deadline = time.monotonic() + part.limit
        faults = []
        with (self.out / f"{part.name}.log").open("w") as log:
            for command in part.commands:
                for restart in range(MOST_RESTARTS):
                    again = ("--resume",) if part.resumes and (resume or restart) else ()
                    code = self.call((*command, *again), log, deadline - time.monotonic())
                    if code != DEVICE_LOST or not part.resumes:
                        break
                if code is None:
                    return TIMED_OUT, f"see {part.name}.log"
                if code:
                    faults.append(f"exit status {code}")
        return (FAILED, f"{', '.join(faults)}, see {part.name}.log") if faults else (PASSED, "")

    def call(self, command: Sequence[str], log: IO[str], seconds: float) -> int | None:
        """Exit status, or None where time was over: then it is interrupted, and ended if it does not listen."""
        if seconds <= 0:
            return None
        print(f"$ {' '.join(command)}", file=log, flush=True)
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=self.environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.end(process)
            return None
        except BaseException:
            self.end(process)
            raise

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Interrupt the part's processes, then end those that are left."""
        for number, patience in ((signal.SIGINT, PATIENCE), (signal.SIGKILL, PATIENCE)):
            try:
                os.killpg(process.pid, number)
                process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                return


def slug(name: str) -> str:
    """A folder's name for a device."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusedres.bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--essential", action="store_true", help="only the parts of the first eight minutes")
    parser.add_argument("--parts", type=lambda text: text.split(","), help="some of them, separated by commas")
    parser.add_argument("--fresh", action="store_true", help="run parts that have passed before, too")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on an emulated GPU")
    parser.add_argument("--device", default="cuda", help="such as cuda:1")
    parser.add_argument("--out", type=Path, help="folder (default: bench/results/<gpu>)")
    parser.add_argument("--list", action="store_true", help="print the parts, and stop")
    return parser


def _chosen(parts: Sequence[Part], options: argparse.Namespace) -> list[Part]:
    names = [part.name for part in parts]
    for name in options.parts or ():
        if name not in names:
            raise ValueError(near("parts", name, names))
    wanted = [part for part in parts if part.essential or not options.essential]
    return [part for part in wanted if options.parts is None or part.name in options.parts]


def _device(options: argparse.Namespace) -> Device:
    if options.dry:
        return device_named(DRY_DEVICE)
    found = gpus()
    device = device_named(options.device) if found else None
    if device is None or not device.is_gpu:
        here = ", ".join(found) or "PyTorch sees none here"
        raise ValueError(f"device: expected a GPU ({here}), got {options.device!r}; DRY=1 runs every step without one")
    return device


def _folder(options: argparse.Namespace, device: Device) -> Path:
    name = "dry-run" if options.dry else slug(machine(device).device)
    out = (options.out or ROOT / "bench" / "results" / name).resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"out: expected a folder that can be written, got {out}: {error.strerror}") from error
    return out


def _real_parts(out: Path, device: Device) -> tuple[Part, ...]:
    memory = torch.cuda.get_device_properties(device.torch).total_memory
    return real_parts(out, target_for(device), memory, device.name)


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for; 1 if a part failed, 2 if the arguments or the machine do not allow it."""
    options = _parser().parse_args(arguments)
    try:
        if not (ROOT / "tests" / "kernels").is_dir():
            raise ValueError("make gpu needs a checkout of the repository: its tests are not in the wheel")
        device = _device(options)
        out = _folder(options, device)
        every = dry_parts(out, device.name) if options.dry else _real_parts(out, device)
        parts = _chosen(every, options)
    except (ValueError, RuntimeError) as error:
        print(f"make gpu: error: {error}", file=sys.stderr)
        return 2
    if options.list:
        for part in parts:
            print(f"{part.name:12} {'essential' if part.essential else '':10} {part.limit:5} s  {part.what}")
        return 0
    # The device's own clock decides how long things take: OpenMP's threads would only get in each other's way.
    environment = {"FUSEDRES_TEST_DEVICE": device.name, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    runner = Runner(out, machine(device).commit, environment, fresh=options.fresh)
    try:
        passed = runner.run([part for part in parts if part.essential])
        summary.write(out, every, runner.outcomes, device)
        passed &= runner.run([part for part in parts if not part.essential])
    except KeyboardInterrupt:
        print("interrupted; run it again to go on", flush=True)
        return 130
    finally:
        summary.write(out, every, runner.outcomes, device)
        print(f"written: {out / 'summary.md'}", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
