"""What a compiled kernel asks of the hardware, read from its binary, and the budgets that this is held to."""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from fusedres.compiler import code
from fusedres.compiler.code import NOTHING, Code, Segment, Shared, read_gcn, read_sass
from fusedres.compiler.targets import Target, Unavailable, target_named

# The widest access that every target has, and what the budget asks for.
WIDE_ACCESS = 16


@dataclass(frozen=True)
class Figures:
    """What one binary asks for. None is what its target's binaries do not say.

    Attributes:
        registers: per thread; on AMD the vector registers, accumulation registers included.
        scalar_registers: per wave, on AMD; NVIDIA's binaries do not count their uniform registers.
        spilled_registers: vector and scalar registers without a place, on AMD; NVIDIA's binaries do not count them.
        spill_stores, spill_loads: bytes per thread, each instruction that touches private memory counted once. AMD
            keeps scalar registers in lanes of vector registers first, which moves no bytes.
        stack: bytes of private memory per thread.
        shared: bytes per block, static and dynamic; without the 1 KiB that CUDA reserves from sm_90 on, which is not
            part of the target's limit.
        tensor_core, async_copies: instructions.
        access: bytes of the widest access of one thread to global memory; None where there is no such access.
        contracts: whether the kernel multiplies matrices of a type that the target's tensor cores take.
        issue: cycles that the schedulers need to issue the main loop's instructions, over those that the tensor cores
            need to multiply: above 1 they wait, however fast memory is. Of several main loops the worst. None where
            there is none, and on targets other than sm_80 and sm_90.
        narrow: of the bytes that main loops load, the share that comes by accesses of less than 8 bytes; None without
            such a loop.
        serialised: the assembler's messages that it could not keep wgmma asynchronous, by number.
        code: what a warp executes.
    """

    registers: int
    scalar_registers: int | None
    spilled_registers: int | None
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int
    tensor_core: int
    async_copies: int
    access: int | None
    contracts: bool
    issue: float | None
    narrow: float | None = None
    serialised: tuple[str, ...] = ()
    code: Code = NOTHING


def read_figures(compiled: Any, target: str) -> Figures:
    """The `Figures` of what `fusedres.compiler.binary.compile_for` returned for ``target``.

    They are kept in Triton's cache beside the binary, since to disassemble takes as long as to compile.

    Raises:
        Unavailable: Triton or its disassembler is missing, or writes something else than this module reads.
        ValueError: no such target.
    """
    from triton.runtime.cache import get_cache_manager

    spec = target_named(target)
    cache_ = get_cache_manager(compiled.hash)
    name = f"figures-{_version()}.json"
    path = cache_.get_file(name)
    if path is not None:
        return _from_json(Path(path).read_text())
    read = _read_nvidia if spec.backend == "cuda" else _read_amd
    figures = read(compiled, spec)
    cache_.put(json.dumps(vars(figures)), name, binary=False)
    return figures


def _from_json(text: str) -> Figures:
    values = json.loads(text)
    straight, loops = values.pop("code")
    code = Code(Segment(*straight), tuple(Segment(*loop) for loop in loops))
    return Figures(**{**values, "serialised": tuple(values["serialised"]), "code": code})


@cache
def _version() -> str:
    """Changes with what reads, so that figures read by another version of it are read anew."""
    sources = Path(__file__), Path(code.__file__)
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


_DOT = re.compile(r"tt\.dot .*: tensor<[\dx]+x(\w+)> \*")


def _contracts(ttir: str, backend: str) -> bool:
    """fp32 counts only as TF32 on NVIDIA: otherwise tensor cores take it nowhere, or not on every target."""
    for dot in _DOT.finditer(ttir):
        if dot[1] in ("bf16", "f16") or (backend == "cuda" and "inputPrecision = tf32" in dot[0]):
            return True
    return False


# NVIDIA

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_SASS = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;\n]*)", re.MULTILINE)
_SASS_TENSOR_CORE = re.compile(r"[BDHIOQ]MMA|[HIQ]GMMA|UTC[A-Z]*MMA")
_SASS_ASYNC = ("LDGSTS", "UTMALDG", "UTMASTG", "UBLKCP")
_SASS_BULK = ("UTMALDG", "UTMASTG", "UBLKCP")  # a tensor memory access moves 16 bytes at the least
_SASS_GLOBAL = ("LDG", "STG", "LDGSTS", "LD", "ST", "ATOMG", "ATOM", "RED", "REDG")
_SASS_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
RESERVED_SHARED = 1024


def _read_nvidia(compiled: Any, spec: Target) -> Figures:
    text = _disassembled(compiled.asm["cubin"])
    usage = _USAGE.findall(text)
    opcodes = [opcode.split(".") for _, opcode, _ in _SASS.findall(text)]
    if len(usage) != 1 or not opcodes:
        raise Unavailable(
            f"{_cuobjdump()}: its output on a kernel for sm_{spec.arch} has another form than that of CUDA 13, "
            "which fusedres reads: unset TRITON_CUOBJDUMP_PATH to use the one that Triton brings"
        )
    registers, stack, shared, local = map(int, usage[0])
    reserved = RESERVED_SHARED if int(spec.arch) >= 90 else 0
    code = read_sass(text, int(spec.arch), _together(compiled))
    return Figures(
        registers=registers,
        scalar_registers=None,
        spilled_registers=None,
        spill_stores=sum(_sass_bytes(opcode) for opcode in opcodes if opcode[0] == "STL"),
        spill_loads=sum(_sass_bytes(opcode) for opcode in opcodes if opcode[0] == "LDL"),
        stack=stack + local,
        shared=max(shared - reserved, 0) + compiled.metadata.shared,
        tensor_core=sum(_SASS_TENSOR_CORE.fullmatch(opcode[0]) is not None for opcode in opcodes),
        async_copies=sum(opcode[0] in _SASS_ASYNC for opcode in opcodes),
        access=max((_sass_bytes(opcode) for opcode in opcodes if opcode[0] in _SASS_GLOBAL + _SASS_BULK), default=None),
        contracts=_contracts(compiled.asm["ttir"], spec.backend),
        issue=_issue(text, spec),
        narrow=_narrow(code),
        serialised=_serialised(compiled.asm["ptx"]) if "wgmma" in compiled.asm["ptx"] else (),
        code=code,
    )


def _narrow(code: Code) -> float | None:
    loaded = sum(loop.moved for loop in code.main_loops)
    return sum(loop.narrow for loop in code.main_loops) / loaded if loaded else None


_TILE = re.compile(r"tc_gen5_mma.*?memdesc<(\d+)x\d+x\w+,.*?memdesc<\d+x(\d+)x\w+,")
_BOX = re.compile(r"async_tma_copy_(global_to_local|local_to_global).*tensordesc<(\d+(?:x\d+)*)x[a-z]+(\d+)")


def _together(compiled: Any) -> Shared:
    """What single instructions do for a whole block, from the compiler's own representation."""
    ttgir, warps = compiled.asm.get("ttgir", ""), compiled.metadata.num_warps
    found, moved = _TILE.search(ttgir), {"global_to_local": 0, "local_to_global": 0}
    for way, sides, bits in _BOX.findall(ttgir):
        moved[way] += math.prod(map(int, sides.split("x"))) * int(bits) // 8
    tile = (int(found[1]), int(found[2])) if found else Shared().tile
    return Shared(warps, tile, moved["global_to_local"], moved["local_to_global"])


_SERIALISED = re.compile(r"\(C(75\d\d)\)")


def _serialised(ptx: str) -> tuple[str, ...]:
    """What the assembler says of wgmma that it waits for at once, having been asked again."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "kernel.ptx"), str(Path(folder, "kernel.cubin"))
        source.write_text(ptx)
        command = [knobs.nvidia.ptxas.path, "-v", "-lineinfo", "--gpu-name=sm_90a", str(source), "-o", made]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return tuple(sorted(f"C{number}" for number in set(_SERIALISED.findall(done.stderr))))


def _sass_bytes(opcode: list[str]) -> int:
    if opcode[0] in _SASS_BULK:
        return WIDE_ACCESS
    return next((_SASS_BYTES[part] for part in opcode[1:] if part in _SASS_BYTES), 4)


# Each issues one instruction a cycle.
_SCHEDULERS = 4
# Multiply-adds of 16-bit numbers in a cycle, by the tensor cores of a multiprocessor.
_MULTIPLY_ADDS = {80: 1024, 90: 2048}
_HMMA = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4}
_HGMMA = re.compile(r"HGMMA\.64x(\d+)x(\d+)")


class MainLoop(NamedTuple):
    """One warp's share of an iteration: its instructions, and its multiply-adds, of which one in TF32 counts twice."""

    instructions: int
    multiply_adds: int


def main_loops(sass: str) -> list[MainLoop]:
    """The innermost loops that multiply matrices; a loop is what a branch backwards closes."""
    code = _SASS.findall(sass)
    places = {int(address, 16): place for place, (address, _, _) in enumerate(code)}
    loops, latest = [], -1
    for end, (_, opcode, operands) in enumerate(code):
        to = re.search(r"0x[0-9a-f]+", operands) if opcode.startswith("BRA") else None
        start = places.get(int(to[0], 16), end) if to else end
        multiply_adds = sum(_multiply_adds(opcode) for _, opcode, _ in code[start:end])
        # An outer loop begins before, and ends after, the one last found.
        if multiply_adds and start > latest:
            loops.append(MainLoop(end + 1 - start, multiply_adds))
            latest = start
    return loops


def _multiply_adds(opcode: str) -> int:
    kind, *modifiers = opcode.split(".")
    count = 0
    if kind == "HMMA":
        count = _HMMA[modifiers[0]]
    elif shape := _HGMMA.match(opcode):
        count = 64 * int(shape[1]) * int(shape[2]) // 4  # four warps work on one
    # Tensor cores take twice as long in TF32.
    return 2 * count if "TF32" in modifiers else count


def _issue(sass: str, spec: Target) -> float | None:
    """Of one warp on one scheduler and its share of the tensor cores, since all warps do the same."""
    if spec.arch not in _MULTIPLY_ADDS:
        return None
    rate = _MULTIPLY_ADDS[int(spec.arch)] / _SCHEDULERS
    return max((loop.instructions * rate / loop.multiply_adds for loop in main_loops(sass)), default=None)


def _disassembled(cubin: bytes) -> str:
    """Resource usage and SASS of a cubin, by the tools in Triton's wheel."""
    tool = _cuobjdump()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, "--dump-resource-usage", "--dump-sass", file.name], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise Unavailable(f"{tool} failed with exit status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def _cuobjdump() -> str:
    from triton import knobs

    try:
        return str(knobs.nvidia.cuobjdump.path)
    except (RuntimeError, AttributeError):
        raise Unavailable(
            "cuobjdump was not found, and binaries for NVIDIA can not be read without it: it is part of Triton's "
            "wheels (pip install --force-reinstall triton) and of the CUDA toolkit (TRITON_CUOBJDUMP_PATH)"
        ) from None


# AMD

_AMD = re.compile(r"^\s+([a-z]\w+)[ \t]*([^;\n]*)(?:;([^\n]*))?$", re.MULTILINE)
_AMD_TENSOR_CORE = ("v_mfma_", "v_smfmac_", "v_wmma_", "v_swmmac_")
_AMD_GLOBAL = re.compile(r"(?:global|flat|buffer)_(?:load|store|atomic)_")
_AMD_BYTES = (
    (re.compile(r"dwordx4|b128"), 16),
    (re.compile(r"dwordx3|b96"), 12),
    (re.compile(r"dwordx2|[bfu]64"), 8),
    (re.compile(r"dword|[bfu]32"), 4),
    (re.compile(r"byte|[biu]8"), 1),
    (re.compile(r"short|16"), 2),
)


class _AmdInstruction(NamedTuple):
    mnemonic: str
    operands: str
    comment: str

    @property
    def bytes(self) -> int:
        return next((count for pattern, count in _AMD_BYTES if pattern.search(self.mnemonic)), 4)

    @property
    def is_private(self) -> bool:
        """Before gfx940 spills are buffer instructions, which only the compiler's comment tells from others."""
        return self.mnemonic.startswith("scratch_") or "Folded" in self.comment

    @property
    def is_global(self) -> bool:
        return _AMD_GLOBAL.match(self.mnemonic) is not None and not self.is_private

    @property
    def is_async_copy(self) -> bool:
        return self.is_global and ("_lds" in self.mnemonic or self.operands.split()[-1:] == ["lds"])


def _read_amd(compiled: Any, spec: Target) -> Figures:
    text = compiled.asm["amdgcn"]
    metadata = _amd_metadata(text, str(spec.arch))
    code = [_AmdInstruction(*found) for found in _AMD.findall(text.partition(".amdgpu_metadata")[0])]
    private = [instruction for instruction in code if instruction.is_private]
    read = read_gcn(text.partition(".amdgpu_metadata")[0], spec.warp_size)
    return Figures(
        registers=metadata["vgpr_count"],
        scalar_registers=metadata["sgpr_count"],
        spilled_registers=metadata["vgpr_spill_count"] + metadata["sgpr_spill_count"],
        spill_stores=sum(instruction.bytes for instruction in private if "_store_" in instruction.mnemonic),
        spill_loads=sum(instruction.bytes for instruction in private if "_load_" in instruction.mnemonic),
        stack=metadata["private_segment_fixed_size"],
        shared=metadata["group_segment_fixed_size"] + compiled.metadata.shared,
        tensor_core=sum(instruction.mnemonic.startswith(_AMD_TENSOR_CORE) for instruction in code),
        async_copies=sum(instruction.is_async_copy for instruction in code),
        access=max((instruction.bytes for instruction in code if instruction.is_global), default=None),
        contracts=_contracts(compiled.asm["ttir"], spec.backend),
        issue=None,
        narrow=_narrow(read),
        code=read,
    )


def _amd_metadata(text: str, arch: str) -> Mapping[str, int]:
    names = (
        "vgpr_count", "sgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size",
        "group_segment_fixed_size",
    )  # fmt: skip
    found = {name: re.search(rf"^\s+(?:- )?\.{name}:\s+(\d+)$", text, re.MULTILINE) for name in names}
    missing = [name for name, match in found.items() if match is None]
    if missing:
        raise Unavailable(
            f"the assembly of this version of Triton for {arch} does not state {', '.join(missing)}, from which "
            "fusedres reads: pip install 'triton>=3.6'"
        )
    return {name: int(match[1]) for name, match in found.items() if match is not None}


# Budgets
