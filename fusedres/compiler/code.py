"""What the warps of a block execute, read from assembly: straight-line code and loops, and what each keeps busy.

A loop is what a branch backwards closes; an instruction belongs to the innermost. Spin loops, which wait for a barrier,
and what stands behind the last exit are left out. Straight-line code counts as executed once, cold branches included:
an upper bound.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar


class Segment(NamedTuple):
    """Straight-line code, or one iteration of a loop, by one warp.

    Attributes:
        instructions: how many are issued.
        busiest: cycles of a scheduler that the busiest of its pipes takes.
        multiply_adds: on tensor cores, by this warp's share of wider instructions; one of TF32 counts twice.
        synchronous: of these, by instructions whose operands lie in registers (mma.sync).
        shared: bytes through shared memory.
        moved: bytes from and to memory, of all lanes.
        waits: how often the warp waits for loads that nothing has hidden.
        copied: of the bytes moved, those copied asynchronously into shared memory.
        narrow: of the bytes moved, those loaded by accesses of less than 8 bytes to a lane.
    """

    instructions: int = 0
    busiest: int = 0
    multiply_adds: int = 0
    synchronous: int = 0
    shared: int = 0
    moved: int = 0
    waits: int = 0
    copied: int = 0
    narrow: int = 0


class Code(NamedTuple):
    """A kernel's straight-line code, and its loops in the order in which they begin."""

    straight: Segment
    loops: tuple[Segment, ...]

    @property
    def segments(self) -> tuple[Segment, ...]:
        return (self.straight, *self.loops)

    @property
    def main_loops(self) -> list[Segment]:
        """Those that multiply matrices."""
        return [loop for loop in self.loops if loop.multiply_adds]


class Instruction(NamedTuple):
    """One line of SASS: where it stands, what it is, and on what."""

    address: int
    opcode: str
    operands: str

    @property
    def kind(self) -> str:
        return self.opcode.partition(".")[0]


NOTHING = Code(Segment(), ())
WIDE_LOAD = 8

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;\n]*)", re.MULTILINE)
_REGISTER = re.compile(r"\bR(\d+)\b")
_TO = re.compile(r"0x[0-9a-f]+")
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
LANES = 32

# Lanes of a scheduler's pipes, from the throughput table of the CUDA programming guide ("Arithmetic Instructions"):
# of fp32 32 from sm_86 on and 16 before, of integers and logic 16, of conversions and special functions 4.
_FP32 = ("FADD", "FMUL", "FFMA", "HFMA2", "HADD2", "HMUL2", "FADD2", "FMUL2", "FFMA2")
_SPECIAL = ("MUFU", "F2F", "F2I", "I2F", "I2FP", "F2IP", "POPC", "FLO")
_MEMORY = (
    "LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDGSTS", "LD", "ST", "LDC", "LDL", "STL", "SHFL", "ATOMG", "RED",
    "ATOM", "REDG", "MATCH", "LDTM", "STTM",
)  # fmt: skip
_FREE = ("NOP", "EXIT", "DEPBAR", "LDGDEPBAR", "BSSY", "BSYNC", "WARPSYNC")
# Multiply-adds of HMMA by shape; HGMMA's and UTCHMMA's stand in their names.
_HMMA = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4}
_HGMMA = re.compile(r"HGMMA\.64x(\d+)x(\d+)")
_SPIN = ("SYNCS", "UTCATOMSWS", "NANOSLEEP")


class Shared(NamedTuple):
    """What single instructions do for all warps of a block, which assembly does not say.

    Attributes:
        warps: of a block.
        tile: rows and columns that one UTCHMMA of sm_100 multiplies.
        loaded, stored: bytes of all boxes that tensor descriptors move.
    """

    warps: int = 4
    tile: tuple[int, int] = (128, 64)
    loaded: int = 0
    stored: int = 0


def read_sass(sass: str, arch: int, together: Shared = Shared()) -> Code:  # noqa: B008
    """The `Code` of a kernel for sm_<arch>."""
    code = [Instruction(int(address, 16), opcode, rest) for address, opcode, rest in _LINE.findall(sass)]
    last = max((place for place, one in enumerate(code) if one.kind == "EXIT"), default=len(code))
    code = code[: last + 1]
    kinds = Counter(one.kind for one in code)
    rows, columns = together.tile
    share = {
        "UTCHMMA": (rows * columns * 16 // together.warps, (rows + columns) * 32 // together.warps),
        "UTMALDG": (0, together.loaded // max(1, kinds["UTMALDG"]) // together.warps),
        "UTMASTG": (0, together.stored // max(1, kinds["UTMASTG"]) // together.warps),
    }
    found = _divided(code, _loops(code), lambda part: _segment(part, arch, share))
    if any(loop.copied for loop in found.loops):
        # A pipeline's first copies stand before its loop, which makes the last ones in vain: as many as it has steps.
        moved, shared, copied = found.straight.moved, found.straight.shared, found.straight.copied
        found = found._replace(straight=found.straight._replace(moved=moved - copied, shared=shared - copied))
    return found


AnyLine = TypeVar("AnyLine")


def _divided(code: Sequence[AnyLine], loops: Mapping[int, int], segment: Callable[[list[AnyLine]], Segment]) -> Code:
    """``code`` with loops from place to place, each line in the innermost."""
    inside: list[int | None] = [None] * len(code)
    for start, end in sorted(loops.items(), key=lambda ends: ends[0] - ends[1]):  # the innermost has the last word
        inside[start : end + 1] = [start] * (end + 1 - start)

    def part(start: int | None) -> Segment:
        return segment([line for line, of in zip(code, inside, strict=True) if of == start])

    return Code(part(None), tuple(part(start) for start in sorted(loops)))


def _loops(code: Sequence[Instruction]) -> dict[int, int]:
    """Last place by first of each loop; of several that begin at one place the longest."""
    places = {one.address: place for place, one in enumerate(code)}
    ends: dict[int, int] = {}
    for end, one in enumerate(code):
        to = _TO.search(one.operands) if one.kind == "BRA" else None
        start = places.get(int(to[0], 16), end) if to else end
        if start < end and not (end - start < 10 and any(other.kind in _SPIN for other in code[start:end])):
            ends[start] = end
    return ends


def _segment(code: Sequence[Instruction], arch: int, share: Mapping[str, tuple[int, int]]) -> Segment:
    kinds = Counter(one.kind for one in code)
    issued = sum(count for kind, count in kinds.items() if kind not in _FREE)
    uniform = sum(count for kind, count in kinds.items() if kind.startswith("U") and not kind.startswith("UT"))
    fp32 = sum(kinds[kind] for kind in _FP32) * (2 if arch == 80 else 1)
    special = 8 * sum(kinds[kind] for kind in _SPECIAL)
    memory = 2 * sum(kinds[kind] for kind in _MEMORY)
    products = sum(count for kind, count in kinds.items() if kind.endswith("MMA"))
    others = issued - uniform - products - sum(kinds[kind] for kind in (*_FP32, *_SPECIAL, *_MEMORY))
    shared = multiplied = synchronous = moved = copied = narrow = 0
    for one in code:
        multiply_adds, read = _product(one, share)
        multiplied += multiply_adds
        synchronous += multiply_adds if one.kind == "HMMA" else 0
        shared += read
        if one.kind in ("LDSM", "STSM"):
            matrices = one.opcode.rpartition(".")[2]
            shared += 128 * (int(matrices) if matrices.isdigit() else 1)
        elif one.kind in ("LDS", "STS", "LDGSTS"):
            shared += LANES * access_bytes(one.opcode)
        if one.kind in ("LDG", "STG", "LDGSTS", "LD", "ST"):
            width = access_bytes(one.opcode)
            moved += LANES * width
            narrow += LANES * width if width < WIDE_LOAD and not one.kind.startswith("ST") else 0
        if one.kind in ("UTMALDG", "UTMASTG"):
            moved += read
        copied += LANES * access_bytes(one.opcode) if one.kind == "LDGSTS" else read if one.kind == "UTMALDG" else 0
    return Segment(issued, max(fp32, 2 * others, special, memory), multiplied, synchronous, shared, moved,
                   _waits(code), copied, narrow)  # fmt: skip


def access_bytes(opcode: str) -> int:
    """Of one lane."""
    return next((_BYTES[part] for part in opcode.split(".")[1:] if part in _BYTES), 4)


def _product(one: Instruction, share: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """Multiply-adds of one warp, and bytes that go through shared memory for it by other units than its own.

    ``share``: a warp's, of what one instruction does for all.
    """
    kind, *modifiers = one.opcode.split(".")
    weight = 2 if "TF32" in modifiers else 1  # tensor cores take twice as long
    if kind == "HMMA" and modifiers and modifiers[0] in _HMMA:
        return weight * _HMMA[modifiers[0]], 0
    if shape := _HGMMA.match(one.opcode):
        columns, depth = int(shape[1]), int(shape[2])
        itemsize = 4 if "TF32" in modifiers else 2
        # Four warps work on one, whose right operand is read from shared memory, and the left one unless in registers.
        operands = one.operands.split(",")
        rows = 64 if len(operands) > 1 and "gdesc" in operands[1] else 0
        return weight * 64 * columns * depth // 4, (columns + rows) * depth * itemsize // 4
    multiply_adds, moved = share.get(kind, (0, 0))
    return weight * multiply_adds, moved


def _waits(code: Sequence[Instruction]) -> int:
    """How often a register is used while a load into it, and all that were issued by then, is under way."""
    waits, pending = 0, set[int]()
    for one in code:
        registers = [int(found) for found in _REGISTER.findall(one.operands)]
        if pending.intersection(registers):
            waits += 1
            pending.clear()
        if one.kind in ("LDG", "LD") and registers:
            pending.update(range(registers[0], registers[0] + max(1, access_bytes(one.opcode) // 4)))
    return waits


# AMD

_GCN = re.compile(r"^(?:(\.?\w+):|\s+([a-z]\w+)[ \t]*([^;\n]*))", re.MULTILINE)
_GCN_PRODUCT = re.compile(r"v_(?:mfma|wmma|smfmac|swmmac)_\w+?_(\d+)x(\d+)x(\d+)")
_GCN_SPECIAL = re.compile(r"v_(?:exp|log|rcp|rsq|sqrt|sin|cos)_")
_GCN_ACCESS = re.compile(r"(ds|global|flat|buffer)_(load|store|read|write)\w*")
_GCN_BYTES = (
    (re.compile(r"x4\b|b128|dwordx4"), 16), (re.compile(r"x3\b|b96|dwordx3"), 12),
    (re.compile(r"x2\b|b64|2_b32|2st64_b32|dwordx2"), 8), (re.compile(r"byte|[biu]8\b"), 1),
    (re.compile(r"short|16"), 2),
)  # fmt: skip
# A SIMD takes this many cycles for a wave of 64 lanes.
_WAVE_CYCLES = 4


def read_gcn(assembly: str, lanes: int) -> Code:
    """The `Code` of a kernel for an AMD GPU whose waves have so many lanes."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for label, opcode, operands in _GCN.findall(assembly):
        if label:
            labels[label] = len(code)
        elif opcode:
            code.append(Instruction(len(code), opcode, operands))
    loops = {
        labels[one.operands.strip()]: place
        for place, one in enumerate(code)
        if one.opcode.startswith(("s_cbranch", "s_branch")) and labels.get(one.operands.strip(), place) < place
    }
    return _divided(code, loops, lambda part: _gcn_segment(part, lanes))


def _gcn_segment(code: Sequence[Instruction], lanes: int) -> Segment:
    cycles = _WAVE_CYCLES * lanes // 64 or 1
    vector = sum(one.opcode.startswith("v_") and not _GCN_PRODUCT.match(one.opcode) for one in code)
    special = sum(bool(_GCN_SPECIAL.match(one.opcode)) for one in code)
    multiplied = shared = moved = narrow = waits = 0
    loading = False
    for one in code:
        if product := _GCN_PRODUCT.match(one.opcode):
            multiplied += int(product[1]) * int(product[2]) * int(product[3])
        if access := _GCN_ACCESS.match(one.opcode):
            width = next((count for pattern, count in _GCN_BYTES if pattern.search(one.opcode)), 4)
            if access[1] == "ds":
                shared += lanes * width
            else:
                moved += lanes * width
                loads = access[2] in ("load", "read")
                narrow += lanes * width if loads and width < WIDE_LOAD else 0
                loading |= loads
        if loading and one.opcode == "s_waitcnt" and "vmcnt" in one.operands:
            waits, loading = waits + 1, False
    return Segment(len(code), cycles * (vector + 3 * special), multiplied, 0, shared, moved, waits, 0, narrow)
