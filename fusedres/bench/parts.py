"""The parts of `make gpu`: what each runs, and for how long at most."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ESSENTIAL_SECONDS", "Outcome", "Part", "dry_parts", "real_parts"]

# What the essential parts may take together.
ESSENTIAL_SECONDS = 480
PYTHON = sys.executable
BENCH = (PYTHON, "-m", "fusedres", "bench")
LAUNCHES = "launches"


@dataclass(frozen=True)
class Part:
    """One step of the run.

    Attributes:
        name: of the part, its log and its files.
        what: one line for people.
        limit: seconds, after which it is ended and the next part begins.
        commands: run one after the other, each as far as it comes.
        essential: whether it belongs to the first eight minutes.
        needs: a program without which the part is left out, and where to get it.
        left_out: why it is, whatever is here; empty: it is not.
        resumes: whether the command takes ``--resume`` after it was cut short.
    """

    name: str
    what: str
    limit: int
    commands: tuple[tuple[str, ...], ...]
    essential: bool = True
    needs: tuple[str, str] | None = None
    left_out: str = ""
    resumes: bool = False

    def why_not(self) -> str | None:
        """Why it can not run on this machine, or None."""
        if self.left_out:
            return self.left_out
        if self.needs is None or shutil.which(self.needs[0]):
            return None
        return f"{self.needs[0]} is not installed: {self.needs[1]}"


@dataclass(frozen=True)
class Outcome:
    """How a part went."""

    status: str
    reason: str
    seconds: float
    commit: str
    date: str


SANITIZER = ("compute-sanitizer", "it comes with NVIDIA's CUDA toolkit")


def _bench(name: str, out: Path, device: str, *arguments: str, limit: int, what: str, essential: bool = False) -> Part:
    files = ("--csv", str(out / f"{name}.csv"), "--html", str(out / f"{name}.html"))
    return Part(name, what, limit, ((*BENCH, "--device", device, *arguments, *files),), essential, resumes=True)


def _tests(name: str, out: Path, *arguments: str, workers: int, limit: int, what: str, essential: bool = False) -> Part:
    spread = ("-n", str(workers)) if workers > 1 else ()
    command = (
        PYTHON, "-m", "pytest", "tests/kernels", "-q", "-p", "no:cacheprovider", "--maxfail=50",
        f"--junitxml={out / f'{name}.xml'}", *spread, *arguments,
    )  # fmt: skip
    return Part(name, what, limit, (command,), essential)


def _sanitized(name: str, tools: Sequence[str], keywords: str, *, limit: int, essential: bool) -> Part:
    # Allocations of their own show where each ends.
    alone = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", SANITIZER[0])
    options = ("--error-exitcode", "9", "--target-processes", "all")
    tests = (PYTHON, "-m", "pytest", "tests/kernels", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", keywords)
    commands = tuple((*alone, "--tool", tool, *options, *tests) for tool in tools)
    what = f"bounds and races: compute-sanitizer {', '.join(tools)}"
    return Part(name, what, limit, commands, essential, SANITIZER)


def _doctor(device: str, *, limit: int) -> Part:
    queries = (("nvidia-smi",), ("nvidia-smi", "-q"), ("rocm-smi",))
    found = tuple(query for query in queries if shutil.which(query[0]))
    checks = (PYTHON, "-m", "fusedres", "doctor", "--kernels", "--device", device)
    what = "GPU, driver, versions; every kernel once against fp64"
    return Part("doctor", what, limit, (*found, checks, (PYTHON, "-m", "torch.utils.collect_env")))


def _launches(out: Path, device: str, *arguments: str, limit: int) -> Part:
    files = ("--csv", str(out / f"{LAUNCHES}.csv"), "--plot", str(out / f"{LAUNCHES}.png"))
    command = (PYTHON, "-m", "fusedres.bench.launches", "--device", device, *arguments, *files)
    what = "predicted against measured times of a step's launches, for fusedres calibrate"
    return Part(LAUNCHES, what, limit, (command,), resumes=True)


def _tune(*arguments: str, limit: int, left_out: str = "") -> Part:
    command = (PYTHON, "-m", "fusedres", "tune", *arguments)
    return Part("tune", "a plan of this GPU for ResNet-50", limit, (command,), left_out=left_out)


NETWORKS = "resnet50,resnet18,cifar_resnet56"
ODD = "odd or tails or pixel"  # where an access beyond the end would be


def real_parts(out: Path, target: str, memory: int, device: str = "cuda") -> tuple[Part, ...]:
    """On a GPU with so many bytes, whose kernels are those of ``target``: essential ones first, most telling first."""
    workers = max(1, min(16, len(os.sched_getaffinity(0))))
    ladder = ("--contenders", "fused,ladder")
    aot = (PYTHON, "-m", "fusedres", "compile", "--targets", target)
    # Eager PyTorch needs 15 GB for a training step of 256 images in 16 bits, and 24 GB for MLPerf's 400.
    batch, mlperf = ("256" if memory > 18e9 else "64"), ("400" if memory > 30e9 else "64")
    resnet = ("--model", "resnet50", "--batch", batch, "--dtype", "bf16", "--train")
    sizes = ("--batch", batch, "--dtype", "bf16")
    return (
        _doctor(device, limit=110),
        _tune("resnet50", *sizes, limit=170),
        _launches(out, device, "--model", "resnet50", *sizes, "--seconds", "60", limit=85),
        _bench("headline", out, device, *resnet, "--contenders", "eager,compile,tuned", "--seconds", "10", "--plot",
               str(out / "headline.png"), limit=115, what="ResNet-50 in training, bf16: eager, torch.compile, tuned",
               essential=True),
        # What follows takes as long as it takes.
        Part("compile", "ResNet-50's binaries into Triton's cache, on all cores", 600,
             ((*aot, "--models", "resnet50", "--dtypes", "bf16"),), essential=False),
        _bench("parity-16", out, device, "--model", "resnet50,cifar_resnet20", "--dtype", "bf16", "--batch", "8",
               *ladder, "--gate-only", limit=600, what="whole networks against fp64, every rung"),
        _tests("kernels", out, "-m", "not slow", workers=workers, limit=900,
               what="every op against fp64, every configuration"),
        _bench("ladder", out, device, *resnet, *ladder, "--seconds", "15", limit=600,
               what="ResNet-50 in training, bf16, every rung"),
        _sanitized("bounds", ("memcheck",), f"act_mask and ({ODD})", limit=300, essential=False),
        _bench("infer", out, device, "--model", "resnet50", "--batch", batch, "--dtype", "bf16,fp16", "--infer",
               "--contenders", "eager-nchw,eager,compile,cudnn,fused,eager-graph,fused-graph", limit=900,
               what="ResNet-50 in inference"),
        _bench("mlperf", out, device, "--model", "resnet50", "--batch", mlperf, "--dtype", "fp16,bf16", "--train",
               "--contenders", "eager,fused,ladder,eager-graph,fused-graph", limit=900,
               what="ResNet-50 as MLPerf trains it"),
        _bench("networks", out, device, "--model", f"{NETWORKS},resnet101,resnet152,resnext50_32x4d", "--batch", "128",
               "--dtype", "bf16,fp16,tf32,fp32", "--contenders", "eager-nchw,eager,compile,fused,ladder,inplace_abn",
               limit=5400, what="networks in every format"),
        _bench("ops", out, device, "--op", "all", "--dtype", "bf16,fp16,tf32", "--contenders",
               "eager-nchw,eager,compile,cudnn,fused", "--plot", str(out / "ops.png"), limit=2700,
               what="ops with the shapes of ResNet-50"),
        _bench("blocks", out, device, "--block", "all", "--dtype", "bf16", "--contenders",
               "eager,compile,fused,ladder,inplace_abn", limit=2700, what="blocks of every stage"),
        _bench("autotuned", out, device, "--model", NETWORKS, "--batch", "128", "--dtype", "bf16", "--contenders",
               "eager,compile-max,eager-graph,fused,fused-graph", limit=3600,
               what="against torch.compile's max-autotune and CUDA graphs"),
        _bench("parity", out, device, "--model", f"{NETWORKS},resnext50_32x4d", "--dtype", "bf16,fp16,tf32,fp32",
               "--batch", "8", *ladder, "--gate-only", limit=3600, what="more networks, every format"),
        _tests("kernels-all", out, workers=workers, limit=5400, what="every op, every case in every format"),
        _sanitized("sanitizer", ("memcheck", "racecheck", "synccheck"), ODD, limit=5400, essential=False),
    )  # fmt: skip


def dry_parts(out: Path, device: str) -> tuple[Part, ...]:
    """Every step once with tiny shapes on an emulated GPU; what is measured there means nothing."""
    target = device.partition(":")[2]
    tiny = ("--px", "4", "--batch", "1")
    timed = ("--rounds", "1")
    return (
        _doctor(device, limit=300),
        _tune("resnet50", limit=0, left_out="a plan is measured on a GPU, and none is used here"),
        _launches(out, device, "--model", "cifar_resnet20", "--batch", "2", "--px", "8", "--dtype", "bf16", "--infer",
                  limit=300),
        Part("compile", "binaries into Triton's cache", 300,
             ((PYTHON, "-m", "fusedres", "compile", "--targets", target, "--models", "cifar_resnet20", "--dtypes",
               "bf16"),)),
        _bench("parity", out, device, "--block", "basic1", *tiny, "--train", "--dtype", "fp32", "--contenders",
               "fused,fused-moments", "--gate-only", limit=300, what="a block against fp64", essential=True),
        _bench("headline", out, device, "--block", "basic1", *tiny, *timed, "--dtype", "bf16", "--infer",
               "--contenders", "eager-nchw,eager,inplace_abn,cudnn,tuned,fused-graph", "--plot",
               str(out / "headline.png"), limit=300, what="a block, timed", essential=True),
        _tests("kernels", out, "-m", "not slow", "-k", "act_mask and every_tile", workers=1, limit=300,
               what="an op against fp64, every configuration"),
        _sanitized("bounds", ("memcheck",), ODD, limit=60, essential=True),
        _bench("ops", out, device, "--op", "add_relu.stage1,bn_statistics.stage1", *tiny, *timed, "--dtype", "bf16",
               "--contenders", "eager,cudnn,fused", "--plot", str(out / "ops.png"), limit=300, what="ops, timed"),
    )  # fmt: skip
