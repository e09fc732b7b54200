"""Triton kernels compiled for a GPU that is not here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from fusedres.compiler.targets import require_triton, target_named, triton, triton_version

try:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
except ImportError:  # no wheels for this platform
    pass

_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
    torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "u1",
}  # fmt: skip

WHOLE = ("i32", "i64")

# Where compilers keep a promise of 16-byte alignment, of a pointer or of a number of elements.
ALIGNMENT = 16


class Specialisation(NamedTuple):
    """What a binary is compiled for, each in the kernel's order of arguments, so that equal ones compare as equal.

    Attributes:
        signature: types by name.
        constants: compile-time values by name.
        aligned: arguments that 16 divides.
        small: pointers into less than 2 GiB, which AMD's compiler addresses in 32 bits.
    """

    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    small: tuple[str, ...]


class Binary(NamedTuple):
    """A kernel and all that its compiler is told but the target: equal where two launches run the same code."""

    kernel: Any
    specialisation: Specialisation
    num_warps: int
    num_stages: int
    all_registers: bool = False  # or as many as `known.register_limit` leaves; else what the compiler chooses
    registers: int = 0  # that it leaves, whatever `known.register_limit` says; 0: as that says

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def odd(self) -> list[str]:
        """Arguments that are not known to be multiples of 16."""
        signature, _, aligned, _ = self.specialisation
        known = {*aligned, *(parameter.name for parameter in self.kernel.params if parameter.do_not_specialize)}
        return [f"{name}%16" for name, type_ in signature if (type_ in WHOLE or type_[0] == "*") and name not in known]

    @property
    def variant(self) -> str:
        """The types behind its pointers, arguments that 16 does not divide, its constants, and pointers left out."""
        signature, constants, _, _ = self.specialisation
        types = dict.fromkeys(type_[1:] for _, type_ in signature if type_.startswith("*"))
        chosen = [
            name if value is True else f"{name}={value}"
            for name, value in constants
            if value is not None and value is not False
        ]
        absent = [f"no {name.removesuffix('_ptr')}" for name, value in constants if value is None]
        return " ".join(["/".join(types), *self.odd, *chosen, *absent])


def specialise(kernel: Any, arguments: Mapping[str, Any]) -> Specialisation:
    """What Triton's launcher would compile ``kernel`` for, given a value for each of its arguments.

    Tensors may be on any device, meta included. A whole number equal to 1 becomes a constant, unless the kernel asks
    for none of its values to be looked at.

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
    signature, constants, aligned, small = [], [], [], []
    for parameter in kernel.params:
        name, value = parameter.name, arguments[parameter.name]
        general = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (_is_one(value) and not (general or parameter.annotation_type)):
            signature.append((name, "constexpr"))
            constants.append((name, value))
            continue
        signature.append((name, parameter.annotation_type or _type_name(kernel, name, value)))
        if general:
            continue
        if not parameter.do_not_specialize_on_alignment and _is_aligned(value):
            aligned.append(name)
        if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() < 2**31:
            small.append(name)
    return Specialisation(tuple(signature), tuple(constants), tuple(aligned), tuple(small))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_one(value: Any) -> bool:
    return _is_whole(value) and value == 1


def _type_name(kernel: Any, name: str, value: Any) -> str:
    if isinstance(value, torch.Tensor) and value.dtype in _TYPES:
        return "*" + _TYPES[value.dtype]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"{kernel.__name__}: {name}: expected a tensor or a number, got {value!r}")


def _is_aligned(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.data_ptr() % ALIGNMENT == 0  # on the meta device, the offset
    return _is_whole(value) and value % ALIGNMENT == 0


# What a thread of NVIDIA's can address.
MOST_REGISTERS = 255


def compile_options(backend: str, num_warps: int, num_stages: int, *, registers: int = 0) -> dict[str, Any]:
    """What Triton is told beside the kernel and its arguments.

    ``registers``: how many a thread may have at most. Where nothing is said (0), NVIDIA's compiler spills a few bytes,
    in loops too, to fit one block more on a multiprocessor.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if registers and backend == "cuda":
        options["maxnreg"] = registers
    return options


def compile_for(
    kernel: Any, specialisation: Specialisation, target: str, *, num_warps: int = 4, num_stages: int = 3,
    registers: int = 0,
) -> Any:  # fmt: skip
    """Triton's compiled kernel for ``target``, made without that GPU.

    Its ``asm`` holds every stage (``llir``, ``ptx`` and ``cubin``, or ``amdgcn`` and ``hsaco``). It is kept in Triton's
    cache, where a launch on that GPU finds it.

    Raises:
        Unavailable: Triton is not installed.
        ValueError: no such target.
    """
    return recipe(
        kernel, specialisation, target, num_warps=num_warps, num_stages=num_stages, registers=registers
    ).made()


class Recipe(NamedTuple):
    """All that Triton is told to compile a kernel, in its own words: what it knows the binary by in its cache.

    Attributes:
        kernel: the ``@triton.jit`` function.
        signature: types by name.
        constants: compile-time values, by place.
        promises: what is known of arguments, by place.
        gpu: backend, architecture and warp size.
        options: warps, stages and registers.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int], Any]
    promises: dict[tuple[int], list[list[Any]]]
    gpu: tuple[str, int | str, int]
    options: dict[str, Any]

    def made(self, source: Any = None) -> Any:
        """The compiled kernel; ``source``: a class in place of Triton's ``ASTSource``."""
        told = (source or ASTSource)(self.kernel, self.signature, self.constants, self.promises)
        return triton.compile(told, target=GPUTarget(*self.gpu), options=self.options)

    def is_made(self) -> bool:
        """Whether Triton's cache holds it, so that it need not be compiled."""
        try:
            self.made(_Kept)
        except _NotKept:
            return False
        return True


def recipe(
    kernel: Any, specialisation: Specialisation, target: str, *, num_warps: int = 4, num_stages: int = 3,
    registers: int = 0,
) -> Recipe:  # fmt: skip
    """How `compile_for` compiles; raises as it does."""
    require_triton()
    spec = target_named(target)
    positions = {name: (index,) for index, name in enumerate(kernel.arg_names)}
    gpu = GPUTarget(spec.backend, spec.arch, spec.warp_size)
    return Recipe(
        kernel,
        dict(specialisation.signature),
        {positions[name]: value for name, value in specialisation.constants},
        {positions[name]: promises for name, promises in _promises(kernel, specialisation, gpu)},
        (spec.backend, spec.arch, spec.warp_size),
        compile_options(spec.backend, num_warps, num_stages, registers=registers),
    )


class _NotKept(Exception):
    """Of a binary that would have to be compiled."""


if triton is not None:

    class _Kept(ASTSource):
        """A source of what is in Triton's cache: to be compiled is what a kernel found there is spared."""

        def make_ir(self, *arguments: Any, **keywords: Any) -> Any:
            raise _NotKept


def scratch_bytes(compiled: Any) -> int:
    """Global memory that each block of a compiled kernel has for itself, for tensor maps; the launcher brings it."""
    return int(getattr(compiled.metadata, "global_scratch_size", 0))  # of which AMD's compiler in 3.6 knows nothing


def _promises(kernel: Any, specialisation: Specialisation, target: Any) -> Iterator[tuple[str, list[list[Any]]]]:
    """What the compiler is promised of each argument, empty lists included: Triton's cache tells binaries by them.

    They are spelled in the launcher's letters: D for divisible, S for small. Of a constant nothing is promised. From
    3.7 on the launcher says so of each; 3.6 leaves constants out, but takes one that is a string for such letters.
    """
    backend = make_backend(target)
    types, constants = dict(specialisation.signature), dict(specialisation.constants)
    ranges = target.backend == "hip" and triton.knobs.amd.use_buffer_ops
    for parameter in kernel.params:
        name = parameter.name
        letters: Any = None
        if types[name] == "constexpr":
            letters = "" if triton_version() >= (3, 7) else constants[name]
        elif not parameter.do_not_specialize and types[name] not in ("fp32", "u1"):
            letters = "D" * (name in specialisation.aligned) + "S" * (ranges and name in specialisation.small)
        if isinstance(letters, str):
            yield name, backend.parse_attr(letters)
