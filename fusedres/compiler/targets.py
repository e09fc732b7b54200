"""The GPUs that kernels are compiled for, and the compiler that does it."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

try:
    import triton
except ImportError:  # no wheels for this platform
    triton = None


KIB = 1024


class Target(NamedTuple):
    """A GPU architecture: what the compiler calls it, how much shared memory a block may have, and how many blocks run
    side by side: the multiprocessors of a device, or of the largest common one where only the architecture is known."""

    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int
    multiprocessors: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * KIB, 108),
    "sm_86": Target("cuda", 86, 32, 99 * KIB, 84),
    "sm_89": Target("cuda", 89, 32, 99 * KIB, 128),
    "sm_90": Target("cuda", 90, 32, 227 * KIB, 132),
    "sm_100": Target("cuda", 100, 32, 227 * KIB, 148),
    "sm_120": Target("cuda", 120, 32, 99 * KIB, 170),
    "gfx90a": Target("hip", "gfx90a", 64, 64 * KIB, 104),
    "gfx942": Target("hip", "gfx942", 64, 64 * KIB, 304),
    "gfx950": Target("hip", "gfx950", 64, 160 * KIB, 256),
    "gfx1100": Target("hip", "gfx1100", 32, 64 * KIB, 96),
}


# Families of AMD's GPUs whose matrix units kernels are compiled for; of NVIDIA's, tensor cores from this one on.
_MATRIX_UNITS, _TENSOR_CORES = ("gfx90a", "gfx942", "gfx950", "gfx11"), 80


class Unavailable(RuntimeError):
    """Something that compiling kernels or reading binaries needs is missing; the message says what to install."""


def require_triton() -> None:
    """Raise the error that says what to install where Triton is missing."""
    if triton is None:
        raise Unavailable("triton is not installed, and kernels can not be compiled without it: pip install triton")


@cache
def triton_version() -> tuple[int, int]:
    """(major, minor) of the Triton that compiles here, by which compilers and launchers that differ are told apart."""
    require_triton()
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def target_named(name: str) -> Target:
    """The `Target` called ``name``; ValueError with the known names otherwise."""
    if name not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {name!r}")
    return TARGETS[name]


def why_no_kernels(target: Target) -> str | None:
    """Why the library's calls are faster than kernels on a GPU, or None."""
    if triton is None:
        return "triton is not installed"
    if target.backend == "hip":
        if not str(target.arch).startswith(_MATRIX_UNITS):
            return f"kernels use the matrix units of {', '.join(_MATRIX_UNITS)}, and this is {target.arch}"
    elif int(target.arch) < _TENSOR_CORES:
        return f"kernels use tensor cores from sm_{_TENSOR_CORES} on, and this is sm_{target.arch}"
    return None
