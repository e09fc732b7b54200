"""`fusedres doctor`: what is here, what runs fused blocks and why, and whether it computes what it should."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import re
from collections.abc import Iterator

import torch

from fusedres import vgpu
from fusedres.bench import families
from fusedres.bench.cases import ModelCase
from fusedres.bench.contenders import CONTENDERS
from fusedres.bench.gate import Gate
from fusedres.bench.setting import Setting, device_named
from fusedres.commands.model_names import say_whose
from fusedres.compiler.targets import triton
from fusedres.models.sources import source
from fusedres.nn.plain import Bottleneck
from fusedres.plan.gpus import device_gpu
from fusedres.runtime import backends
from fusedres.runtime.devices import gpus
from fusedres.runtime.launch import tf32_allowed, why_not_on
from fusedres.swap import Report, fuse, report

# By extra, as pyproject.toml has them.
EXTRAS = {
    "models": ("torchvision", "timm"),
    "hf": ("transformers",),
    "cli": ("rich", "matplotlib", "jinja2", "scikit-learn", "shtab"),
    "train": ("tensorboard",),
    "vgpu": ("llvmlite",),
}
NEAR = "as near to fp64 as eager PyTorch is"
# As pyproject.toml has them; pip does not hold to them what is installed later.
OLDEST = {"torch": (2, 10), "triton": (3, 6)}


def run(options: argparse.Namespace) -> int:
    """Print what there is to say of this machine, and of a model; 1 if something computes what it should not.

    Raises:
        ValueError: no such model or device, or kernels are to be checked where none run.
    """
    model, kernels, device = options.model, options.kernels, options.device
    chosen = [device] if device is not None else gpus() or ["cpu"]
    if device is not None:
        device_named(device)
    if kernels and "cpu" in chosen:
        raise ValueError("kernels: expected a GPU or --device vgpu:<target>, which run them, got cpu")
    built = None
    if model is not None:
        built = source(model).on_meta()
        say_whose([model])
    for name, found in (*_versions(), *_devices(), *_extras()):
        print(f"{name:12}{found}")
    right = True
    for name in chosen:
        for dtype in ("fp32", "bf16"):
            reason = _wrong(name, dtype)
            right &= reason is None
            print(f"{'check':12}a fused block on {name} in {dtype}: {reason or NEAR}")
        if kernels:
            right &= _kernels(name)
    if built is not None:
        _say(report(fuse(built)))
    return 0 if right else 1


def _say(told: Report) -> None:
    """As a table that fits the terminal, where the package for it is installed."""
    try:
        from rich.console import Console
    except ImportError:
        print(told)
    else:
        Console(highlight=False).print(told)


def _versions() -> Iterator[tuple[str, str]]:
    yield "fusedres", importlib.metadata.version("fusedres")
    yield "Python", f"{platform.python_version()}, {platform.system()} on {platform.machine()}"
    compute = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    compute = compute if torch.version.hip or torch.version.cuda else "for CPUs"
    yield "torch", f"{torch.__version__}, {compute}{_too_old('torch', torch.__version__)}"
    if triton:
        yield "triton", f"{triton.__version__}{_too_old('triton', triton.__version__)}"
    else:
        yield "triton", "not installed: no kernels"


def _too_old(package: str, version: str) -> str:
    """What is added to an older version than the library asks for."""
    oldest = OLDEST[package]
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or tuple(map(int, numbers.groups())) >= oldest:
        return ""
    return f", too old: fusedres needs {oldest[0]}.{oldest[1]} or newer"


def _devices() -> Iterator[tuple[str, str]]:
    found = gpus()
    for index in range(len(found)):
        reason = why_not_on(index)
        gpu = device_gpu(index)
        times = ", its times predicted by what was measured" if gpu.measured else ""
        runs = f"runs the plain modules: {reason}" if reason else f"runs kernels, planned as {gpu.name}{times}"
        yield f"GPU {index}", f"{torch.cuda.get_device_name(index)}, {runs}"
    if not found:
        yield "GPU", "none that PyTorch sees; the CPU runs the library's calls"
    yield "TF32", f"{'used' if tf32_allowed() else 'not used'} by fp32 convolutions (torch.backends.cudnn.conv)"
    targets = ", ".join(f"{backends.VGPU}{target}" for target in vgpu.TARGETS)
    yield "emulated", vgpu.why_unavailable() or f"backend({targets})"


def _extras() -> Iterator[tuple[str, str]]:
    for extra, packages in EXTRAS.items():
        missing = [name for name in packages if not _installed(name)]
        yield f"[{extra}]", f"lacks {', '.join(missing)}: pip install fusedres[{extra}]" if missing else "installed"


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _kernels(device: str) -> bool:
    """Check every kernel on a device, and say what is wrong; whether nothing is."""
    right, seen = True, set[str]()
    for one in families.checked(device_named(device)):
        if one.reason is None:
            seen |= one.kernels
        else:
            right = False
            print(f"{'kernels':12}{one.case} on {device} in bf16: {one.reason}")
    every = set(families.KERNELS)
    print(f"{'kernels':12}{len(seen & every)} of {len(every)} kernels on {device} in bf16: {NEAR}")
    return right


def _wrong(device: str, dtype: str) -> str | None:
    """What is wrong with a fused block on a device, held against fp64 as benchmarks do, or None."""
    # With a projection: every kind of kernel that training launches but the stem's.
    case = ModelCase("bottleneck", "block", lambda: Bottleneck(64, 32, stride=2), channels=64, px=12, batch=2)
    for mode in case.modes:
        setting = Setting(mode, dtype, case.batch, case.px, device_named(device))
        # On a CPU "auto" would run the plain modules for so little.
        name = "fused-block_end" if device == "cpu" else "fused"
        try:
            with setting.device.made_current(), setting.arithmetic():
                reason = Gate(case, setting).judge(CONTENDERS[name]).reason
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            return f"{mode}: {reason}"
    return None
