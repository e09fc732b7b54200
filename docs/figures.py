"""Every figure of README.md and docs/: counted or measured once, kept in figures.json, put wherever it is named.

    python docs/figures.py                     # pages say what figures.json says
    python docs/figures.py --count             # count anew what can be counted without a GPU; minutes
    python docs/figures.py --measure cpu       # time anew on this machine: cpu, host or digits; an idle machine's work

Pages hold figures between markers, a table as well as one number within a line:

    <!--f:NAME-->what NAME says<!--/f-->

`tests/test_figures.py` holds every page against figures.json, and finds figures that stand outside of markers.
"""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs" / "figures.json"
MARKED = re.compile(r"(<!--f:([\w.]+)-->)(.*?)(<!--/f-->)", re.DOTALL)
MEGA, GIGA = 1e6, 1e9

EXPLAINED = {
    "resnet18.train": ("ResNet-18, 224 px, training", "resnet18", {}),
    "resnet50.train": ("ResNet-50, 224 px, training", "resnet50", {}),
    "cifar_resnet56.train": ("CIFAR ResNet-56, training", "cifar_resnet56", {}),
    "preact_resnet164.train": ("pre-activation ResNet-164, training", "preact_resnet164", {}),
    "resnet18.infer": ("ResNet-18, inference", "resnet18", {"infer": True}),
    "resnet50.infer": ("ResNet-50, inference", "resnet50", {"infer": True}),
    "resnet50.cast": ("ResNet-50, inference, cast to bf16 (`--cast`)", "resnet50", {"infer": True, "cast": True}),
    "cifar_resnet56.infer": ("CIFAR ResNet-56, inference", "cifar_resnet56", {"infer": True}),
}
"""By key: how a table names a step, the model, and what is asked of it besides."""

TIMED = {"resnet50": 8, "resnet18": 8, "cifar_resnet56": 32}
"""Networks that are timed on a CPU, with their batches."""

HOST_TIMED = {
    "ResNet-50, training": ["--model", "resnet50", "--schedule", "moments"],
    "ResNet-50, inference": ["--model", "resnet50", "--infer"],
    "ResNet-18, training": ["--model", "resnet18"],
    "CIFAR ResNet-56, training": ["--model", "cifar_resnet56"],
    "DenseNet-121, training": ["--model", "densenet121"],
}
"""By row: the arguments of ``python -m fusedres.bench.host_time``."""

SEEDS, TRAINED = 3, ["--threads", "2"]
"""Of `fusedres train` as it stands, on digits: how often, and on how many cores."""

RUNGS = {
    "eager": "convolution, batch norm, ReLU, addition as separate passes",
    "block_end": "batch norm + ReLU, and batch norm + addition + ReLU, in one op each; bit masks",
    "stats": "+ statistics in the convolution's epilogue, ReLU mask and batch norm's sums in the input gradient's",
    "prologue": "+ batch norm and ReLU formed on load by the next convolution and by the weight gradient",
    "moments": "+ the last 1×1 convolution's output never exists, forward or backward",
    "auto": "for each block, what is predicted to be fastest",
}


def stamp() -> dict[str, str]:
    """The day and the commit; refused where the library differs from that commit."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    if git("status", "--porcelain", "fusedres"):
        raise SystemExit("fusedres/ has changes that are in no commit: commit them first, figures carry their commit")
    return {"date": datetime.date.today().isoformat(), "commit": git("rev-parse", "--short", "HEAD")}


def count() -> dict[str, Any]:
    """What needs no clock: steps on paper, and what is saved for backward."""
    from fusedres.explain.explanation import Question, explain

    steps = {}
    for key, (_, model, asked) in EXPLAINED.items():
        rungs = () if key == "resnet50.train" else ("auto",)
        found = explain(Question(model, rungs=rungs, **asked))
        steps[key] = {
            name: {**vars(found.figures(step)), "ours": sum(entry.ours for entry in step.entries)}
            for name, step in found.steps.items()
        }
        steps[key]["eager"]["reread_per_image"] = found.reread_per_image()
        print("counted", key, file=sys.stderr, flush=True)
    return {**stamp(), "steps": steps, "saved": _saved()}


def _saved() -> dict[str, dict[str, float]]:
    """MB that autograd keeps of a ResNet-50's training step: for each image, and whatever the batch."""
    import torch
    import torchvision

    import fusedres
    from fusedres.bench.saved_activations import image_loss
    from fusedres.traffic.saved import per_image

    meta = torch.device("meta")
    eager = torchvision.models.resnet50().to(meta).to(memory_format=torch.channels_last).train()
    models = {"eager": eager, "moments": fusedres.fuse(copy.deepcopy(eager), schedule="moments")}
    saved = {}
    for name, model in models.items():
        line = per_image(model, lambda m, n: image_loss(m, n, 224, meta), 64)
        saved[name] = {"per_image": line.slope.as_dtype(torch.bfloat16) / MEGA, "fixed": line.fixed.total / MEGA}
    return saved


def measure_cpu() -> dict[str, Any]:
    """ms of a step by mode and contender, of each network that is timed."""
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for model, batch in TIMED.items():
            table = Path(folder, f"{model}.csv")
            asked = ["--model", model, "--batch", str(batch), "--threads", "2", "--rounds", "7"]
            command = ["-m", "fusedres", "bench", *asked, "--contenders", "eager,fused,frozen", "--csv", str(table)]
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
            with table.open() as file:
                for row in csv.DictReader(file):
                    if row["status"] == "ok":
                        key = f"{model}.{row['mode']}"
                        rows.setdefault(key, {})[row["contender"]] = float(row["median_s"]) * 1e3
    return rows


def measure_host() -> dict[str, Any]:
    """Launches of a step, and ms of one CPU thread for them, gone through and replayed."""
    rows = {}
    for name, arguments in HOST_TIMED.items():
        command = [sys.executable, "-m", "fusedres.bench.host_time", *arguments]
        printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        times = {row: sum(map(float, re.search(rf"^{row} +([\d.]+) +([\d.]+)", printed, re.M).groups()))
                 for row in ("gone through", "replayed")}  # fmt: skip
        rows[name] = {"launches": int(re.search(r"(\d+) launches", printed)[1]), **times}
    return rows


def measure_digits() -> dict[str, Any]:
    """Test accuracy of `fusedres train` as it stands, in %, by seed."""
    accuracies = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(SEEDS):
            out = Path(folder, str(seed))
            command = [sys.executable, "-m", "fusedres", "train", "--seed", str(seed), "--out", str(out), *TRAINED]
            subprocess.run(command, cwd=ROOT, check=True)
            with (out / "log.csv").open() as file:
                accuracies[str(seed)] = 100 * (1 - float(list(csv.DictReader(file))[-1]["held_out_error"]))
    return accuracies


MEASURED: Mapping[str, Callable[[], dict[str, Any]]] = {
    "cpu": measure_cpu,
    "host": measure_host,
    "digits": measure_digits,
}


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n" + "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines) + "\n"


def texts(found: dict[str, Any]) -> dict[str, str]:
    """What each name says in a page: a table, or one figure."""
    return {**_counted(found["counted"]), **_saved_texts(found["counted"]["saved"]), **_measured(found["measured"]),
            **_covered()}  # fmt: skip


def _counted(counted: dict[str, Any]) -> dict[str, str]:
    steps = counted["steps"]
    ladder, eager = steps["resnet50.train"], steps["resnet50.train"]["eager"]
    auto, cast = ladder["auto"], steps["resnet50.cast"]
    reread = (eager["bytes_per_image"] + eager["reread_per_image"]) / MEGA
    said = {
        "counted": f"{counted['date']}, commit {counted['commit']}",
        "eager.gflop": f"{eager['flops_per_image'] / GIGA:.1f} GFLOP",
        "eager.arithmetic": f"{eager['flops_per_image'] / 800e12 * 1e3:.2f} ms",
        "eager.reread": f"{reread:.0f} MB",
        "eager.memory": f"{reread * MEGA / 3.0e12 * 1e3:.2f} ms",
        "auto.fewer": f"{100 * (1 - auto['bytes_per_image'] / eager['bytes_per_image']):.0f} %",
        "auto.mb": f"{auto['bytes_per_image'] / MEGA:.0f} MB",
        "eager.mb": f"{eager['bytes_per_image'] / MEGA:.0f} MB",
        "auto.ms": f"{auto['predicted_ms']:.1f} ms",
        "eager.ms": f"{eager['predicted_ms']:.1f} ms",
        "auto.faster": f"{eager['predicted_ms'] / auto['predicted_ms']:.1f}",
        "auto.saved": f"{auto['saved_bytes_per_image'] / MEGA:.0f} MB",
        "moments.saved": f"{ladder['moments']['saved_bytes_per_image'] / MEGA:.0f} MB",
        "eager.saved": f"{eager['saved_bytes_per_image'] / MEGA:.0f} MB",
        "cast.launches": f"{cast['auto']['launches']} launches",
        "cast.mb": f"{cast['auto']['bytes_per_image'] / MEGA:.0f} MB",
        "cast.eager": f"{cast['eager']['bytes_per_image'] / MEGA:.0f} MB",
    }
    said["ladder"] = _table(
        ["rung", "predicted ms", "band", "launches", "ours", "MB read", "MB written", "MB", "of eager", "GFLOP",
         "MB saved", "images/s at most"],
        [
            [name, f"{one['predicted_ms']:.2f}", "{:.1f}–{:.1f}".format(*one["predicted_band_ms"]),
             str(one["launches"]), str(one["ours"]), f"{one['read_per_image'] / MEGA:.1f}",
             f"{one['written_per_image'] / MEGA:.1f}", f"{one['bytes_per_image'] / MEGA:.1f}",
             f"{one['bytes_per_image'] / eager['bytes_per_image']:.2f}", f"{one['flops_per_image'] / GIGA:.2f}",
             f"{one['saved_bytes_per_image'] / MEGA:.1f}", f"{one['roofline_images_per_s']:,.0f}"]
            for name, one in ladder.items()
        ],
    )  # fmt: skip
    said["rungs"] = _table(
        ["rung", "what it does", "MB", "saved for backward, MB", "predicted ms a step"],
        [
            [f"`{name}`", does, f"{ladder[name]['bytes_per_image'] / MEGA:.0f}",
             f"{ladder[name]['saved_bytes_per_image'] / MEGA:.1f}", f"{ladder[name]['predicted_ms']:.1f}"]
            for name, does in RUNGS.items()
        ],
    )  # fmt: skip
    said["steps"] = _table(
        ["launches, MB per image", "eager", 'fused, `schedule="auto"`'],
        [
            [EXPLAINED[key][0], *(_step(step[name]) for name in ("eager", "auto"))]
            for key, step in steps.items()
        ],
    )  # fmt: skip
    return said


def _step(one: dict[str, Any]) -> str:
    mega = one["bytes_per_image"] / MEGA
    return f"{one['launches']}, {mega:.1f}" if mega < 25 else f"{one['launches']}, {mega:.0f}"


def _saved_texts(saved: dict[str, Any]) -> dict[str, str]:
    rows = [[name, *(f"{saved[key][column]:.1f}" for column in ("per_image", "fixed"))]
            for key, name in (("eager", "eager"), ("moments", 'fused, `schedule="moments"`'))]  # fmt: skip
    return {"saved": _table(["", "MB per image", "MB per step, whatever the batch"], rows)}


def _measured(measured: dict[str, Any]) -> dict[str, str]:
    said = {}
    for name, one in measured.items():
        said[f"{name}.when"] = f"{one['date']}, commit {one['commit']}, {one['machine']}"
    rows = []
    for key, times in measured["cpu"]["rows"].items():
        model, mode = key.split(".")
        title = EXPLAINED[f"{model}.train"][0].removesuffix(", training")
        cells = [f"{times['eager']:.{_digits(times['eager'])}f}"]
        for contender in ("fused", "frozen"):
            ms = times.get(contender)
            cells.append("" if ms is None else f"{ms:.{_digits(ms)}f} ({times['eager'] / ms:.2f}×)")
        rows.append([f"{title}, {'training' if mode == 'train' else 'inference'}", *cells])
    said["cpu"] = _table(["ms a step", "eager", "fused", "frozen"], rows)
    said["host"] = _table(
        ["ms of the CPU a step", "launches", "gone through", "replayed"],
        [[name, str(one["launches"]), f"{one['gone through']:.1f}", f"{one['replayed']:.1f}"]
         for name, one in measured["host"]["rows"].items()],
    )  # fmt: skip
    digits = [f"{one:.1f} %" for one in measured["digits"]["rows"].values()]
    said["digits"] = f"{', '.join(digits[:-1])} and {digits[-1]}"
    said["digits.median"] = f"{statistics.median(measured['digits']['rows'].values()):.1f} %"
    for name, text in measured["by_hand"]["rows"].items():
        said[f"by_hand.{name}"] = f"\n{text}\n" if "\n" in text else text
    return said


def _digits(ms: float) -> int:
    return 0 if ms >= 100 else 1


def _covered() -> dict[str, str]:
    """What coverage.csv beside this file sums up to."""
    with (ROOT / "docs" / "coverage.csv").open() as file:
        rows = list(csv.DictReader(file))
    norms, fused = (sum(int(row[column]) for row in rows) for column in ("norms", "fused"))
    return {
        "covered.models": str(len(rows)),
        "covered.any": str(sum(int(row["fused"]) > 0 for row in rows)),
        "covered.norms": f"{fused:,} of {norms:,}",
    }


def fill(text: str, said: Mapping[str, str]) -> str:
    """A page with what is between its markers as ``said`` has it.

    Raises:
        ValueError: a marker names what there is not.
    """

    def put(marked: re.Match[str]) -> str:
        if marked[2] not in said:
            raise ValueError(f"there is no figure called {marked[2]!r}; docs/figures.py has {', '.join(sorted(said))}")
        return marked[1] + said[marked[2]] + marked[4]

    return MARKED.sub(put, text)


def pages() -> list[Path]:
    """README.md and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="docs/figures.py", description=__doc__.splitlines()[0])
    parser.add_argument("--count", action="store_true", help="count anew, without a GPU")
    parser.add_argument("--measure", action="append", default=[], choices=MEASURED, help="time anew on this machine")
    options = parser.parse_args(arguments)
    found = json.loads(FILE.read_text())
    if options.count:
        found["counted"] = count()
    for name in options.measure:
        from fusedres.bench.machine import machine
        from fusedres.bench.setting import device_named

        found["measured"][name] |= {
            **stamp(),
            "machine": machine(device_named("cpu")).processor,
            "rows": MEASURED[name](),
        }
    FILE.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    said = texts(found)
    for page in pages():
        text = page.read_text()
        if (filled := fill(text, said)) != text:
            page.write_text(filled)
            print(f"{page.relative_to(ROOT)}: figures are new")
    return 0


if __name__ == "__main__":
    sys.exit(main())
