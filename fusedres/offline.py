"""Triton kernels compiled for a GPU that is not here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ImportError:  # no wheels for this platform
    triton = None

KIB = 1024


class Target(NamedTuple):
    """A GPU architecture: what the compiler calls it, and how much shared memory a block may have."""

    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * KIB),
    "sm_86": Target("cuda", 86, 32, 99 * KIB),
    "sm_89": Target("cuda", 89, 32, 99 * KIB),
    "sm_90": Target("cuda", 90, 32, 227 * KIB),
    "sm_100": Target("cuda", 100, 32, 227 * KIB),
    "sm_120": Target("cuda", 120, 32, 99 * KIB),
    "gfx90a": Target("hip", "gfx90a", 64, 64 * KIB),
    "gfx942": Target("hip", "gfx942", 64, 64 * KIB),
    "gfx950": Target("hip", "gfx950", 64, 160 * KIB),
    "gfx1100": Target("hip", "gfx1100", 32, 64 * KIB),
}

_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
    torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip

# Where compilers keep a promise of 16-byte alignment, of a pointer or of a number of elements.
ALIGNMENT = 16


class Specialisation(NamedTuple):
    """What a binary is compiled for: types, compile-time constants, and which arguments 16 divides.

    Each is a tuple of pairs in the kernel's order of arguments, so that equal ones compare and hash as equal.
    """

    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]


def require_triton() -> None:
    """Raise the error that says what to install where Triton is missing."""
    if triton is None:
        raise RuntimeError("triton is not installed, and kernels can not be compiled without it: pip install triton")


def target_named(name: str) -> Target:
    """The `Target` called ``name``; ValueError with the known names otherwise."""
    if name not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {name!r}")
    return TARGETS[name]


def specialise(kernel: Any, arguments: Mapping[str, Any]) -> Specialisation:
    """What Triton's launcher would compile ``kernel`` for, given a value for each of its arguments.

    Tensors may be on any device, meta included: their dtype, offset and, where they have memory, address count.
    A whole number equal to 1 becomes a constant.

    Args:
        kernel: a ``@triton.jit`` function.
        arguments: by name, every argument of the kernel, compile-time ones included.

    Raises:
        TypeError: an argument is missing, unknown, or of a type that kernels do not take.
    """
    missing = [name for name in kernel.arg_names if name not in arguments]
    unknown = [name for name in arguments if name not in kernel.arg_names]
    if missing or unknown:
        raise TypeError(f"{kernel.__name__}: missing arguments {missing}, unknown arguments {unknown}")
    signature, constants, aligned = [], [], []
    for parameter in kernel.params:
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or value is None or (_is_whole(value) and value == 1):
            signature.append((name, "constexpr"))
            constants.append((name, value))
            continue
        signature.append((name, _type_name(kernel, name, value)))
        if _is_aligned(value):
            aligned.append(name)
    return Specialisation(tuple(signature), tuple(constants), tuple(aligned))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _type_name(kernel: Any, name: str, value: Any) -> str:
    if isinstance(value, torch.Tensor) and value.dtype in _TYPES:
        return "*" + _TYPES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"{kernel.__name__}: {name}: expected a tensor or a number, got {value!r}")


def _is_aligned(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        address = value.storage_offset() * value.element_size() if value.is_meta else value.data_ptr()
        return bool(address % ALIGNMENT == 0)
    return _is_whole(value) and value % ALIGNMENT == 0


def compile_for(
    kernel: Any, specialisation: Specialisation, target: str, *, num_warps: int = 4, num_stages: int = 3
) -> Any:
    """Triton's compiled kernel for ``target``, made without that GPU.

    Its ``asm`` holds every stage (``llir``, ``ptx`` and ``cubin``, or ``amdgcn`` and ``hsaco``).

    Raises:
        RuntimeError: Triton is not installed.
        ValueError: no such target.
    """
    require_triton()
    spec = target_named(target)
    positions = {name: (index,) for index, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        dict(specialisation.signature),
        {positions[name]: value for name, value in specialisation.constants},
        {positions[name]: [["tt.divisibility", ALIGNMENT]] for name in specialisation.aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget(spec.backend, spec.arch, spec.warp_size), options=options)
