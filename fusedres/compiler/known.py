"""What compiled kernels ask of a GPU, as it was read from their binaries: so that a choice needs no compiler.

The table beside this file holds a row for every binary that the listed models launch (`fusedres compile --code` writes
it). Another binary is taken for the one of its kernel that is most like it.
"""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from fusedres.compiler.binary import MOST_REGISTERS, Binary, Recipe, recipe
from fusedres.compiler.code import Code, Segment
from fusedres.compiler.figures import Figures, read_figures
from fusedres.compiler.occupancy import occupancy, registers_for
from fusedres.compiler.targets import target_named

TABLE = Path(__file__).with_name("known.csv")
COLUMNS = ("target", "kernel", "form", "limit", "registers", "shared", "code")
# A target without rows is taken for one that has some, of the same vendor and the nearest age.
ALIKE = {
    "sm_86": "sm_89", "sm_120": "sm_89", "gfx90a": "gfx942", "gfx950": "gfx942", "gfx1100": "gfx942", "sm_89": "sm_80",
    "sm_100": "sm_90", "gfx942": "sm_80",
}  # fmt: skip


class Executed(NamedTuple):
    """A binary's needs.

    Attributes:
        limit: of registers that it is compiled under, or 0: as many as the compiler wants.
        registers: of a thread.
        shared: bytes of a block.
        code: of a warp.
        read: whether they are this binary's, and not those of the one most like it.
    """

    limit: int
    registers: int
    shared: int
    code: Code
    read: bool = True


def form_of(binary: Binary) -> str:
    """What tells binaries of a kernel apart: warps, stages, width of numbers, constants, and pointers that are there.

    Types of 16 bits are one, for they are instructions of the same kind.
    """
    signature, constants, _, _ = binary.specialisation
    types = dict.fromkeys(type_[1:] for _, type_ in signature if type_.startswith("*"))
    widths = sorted({"16" if name in ("bf16", "fp16") else name for name in types})
    chosen = [
        name if value is True else f"{name}={value}"
        for name, value in constants
        if value is not None and value is not False
    ]
    there = [name.removesuffix("_ptr") for name, type_ in signature if type_.startswith("*")]
    return " ".join([f"warps={binary.num_warps}", f"stages={binary.num_stages}", *widths, *binary.odd, *chosen, *there])


def executed(binary: Binary, target: str) -> Executed | None:
    """What a binary asks of a target; None where the table holds none of its kernel."""
    return _executed(binary.name, form_of(binary), target)


@functools.lru_cache(maxsize=4096)
def _executed(kernel: str, form: str, target: str) -> Executed | None:
    rows = _table()
    while (target, kernel) not in rows and target in ALIKE:
        target = ALIKE[target]
    known = rows.get((target, kernel))
    if known is None:
        return None
    if form in known:
        return known[form]
    nearest = max(known, key=lambda other: _likeness(form, other))
    return _resized(known[nearest], _elements(form) / _elements(nearest))._replace(read=False)


_NUMBER = re.compile(r"(\w+)=(\d+)$")


def _likeness(form: str, other: str) -> float:
    """The more words are shared the better; of numbers that differ, by how little."""
    ours, theirs = set(form.split()), set(other.split())
    likeness = float(len(ours & theirs) - len(ours ^ theirs))
    numbers = dict(_NUMBER.findall(word)[0] for word in theirs if _NUMBER.match(word))
    for word in ours - theirs:
        found = _NUMBER.match(word)
        if found and found[1] in numbers:
            a, b = int(found[2]) + 1, int(numbers[found[1]]) + 1
            likeness += min(a, b) / max(a, b)
    return likeness


def _elements(form: str) -> float:
    """Of a thread's share of the tile: the two largest sides over the warps."""
    numbers = {name: int(value) for name, value in (m.groups() for m in map(_NUMBER.match, form.split()) if m)}
    sides = sorted((value for name, value in numbers.items() if name.startswith("BLOCK")), reverse=True)[:2]
    product = 1.0
    for side in sides:
        product *= side
    return product / numbers["warps"]


def _resized(row: Executed, ratio: float) -> Executed:
    """A row whose warps do ``ratio`` times as much; of smaller tiles what is common to all of them is not less."""
    if ratio <= 1:
        return row

    def resized(one: Segment) -> Segment:
        more = {name: round(count * ratio) for name, count in one._asdict().items() if name != "waits"}
        return one._replace(**more)

    code = Code(resized(row.code.straight), tuple(map(resized, row.code.loops)))
    return row._replace(registers=min(255, round(row.registers * ratio)), shared=round(row.shared * ratio), code=code)


@functools.cache
def _table() -> dict[tuple[str, str], dict[str, Executed]]:
    rows: dict[tuple[str, str], dict[str, Executed]] = {}
    with TABLE.open(newline="") as file:
        for row in csv.DictReader(file):
            straight, *loops = (Segment(*map(int, part.split())) for part in row["code"].split(";"))
            found = Executed(int(row["limit"]), int(row["registers"]), int(row["shared"]), Code(straight, tuple(loops)))
            rows.setdefault((row["target"], row["kernel"]), {})[row["form"]] = found
    return rows


def register_limit(binary: Binary, target: str) -> int:
    """Registers that a thread of a binary that may have all of them is left, so that one block more fits beside it."""
    row = _table().get((target, binary.name), {}).get(form_of(binary))
    return row.limit if row is not None and row.limit else MOST_REGISTERS


def compile_binary(binary: Binary, target: str) -> Any:
    """As `compile_for`, what a launch was recorded to run."""
    return recipe_of(binary, target).made()


def recipe_of(binary: Binary, target: str) -> Recipe:
    """How `compile_binary` compiles."""
    limit = binary.registers or register_limit(binary, target)
    return _recipe(binary, target, limit if binary.all_registers else 0)


def _recipe(binary: Binary, target: str, registers: int) -> Recipe:
    kernel, specialisation, num_warps, num_stages, *_ = binary
    return recipe(kernel, specialisation, target, num_warps=num_warps, num_stages=num_stages, registers=registers)


def _compiled(binary: Binary, target: str, registers: int) -> Any:
    return _recipe(binary, target, registers).made()


# A limit that takes more instructions than so many times as many is no gain.
MOST_MORE = 1.05
# Under a lower one the assembler has refused instructions of tensor cores that alone have as many operands (48).
FEWEST = 64


def limited(binary: Binary, target: str) -> tuple[int, Figures]:
    """The limit of registers that lets one block more onto a multiprocessor without a spill, or none; and the figures.

    Where shared memory, or anything else, keeps it out, there is no such limit.
    """
    free = binary.all_registers and target_named(target).backend == "cuda"
    figures = read_figures(_compiled(binary, target, MOST_REGISTERS if free else 0), target)
    if not free:
        return 0, figures
    warps = binary.num_warps
    blocks = occupancy(warps, figures.registers, figures.shared, target).blocks
    limit = registers_for(blocks + 1, warps)
    if limit < FEWEST or limit >= figures.registers or occupancy(warps, limit, figures.shared, target).blocks == blocks:
        return MOST_REGISTERS, figures
    less = read_figures(_compiled(binary, target, limit), target)
    more = _instructions(less) > MOST_MORE * _instructions(figures)
    if less.spill_stores or less.spill_loads or less.stack or more or set(less.serialised) - set(figures.serialised):
        return MOST_REGISTERS, figures
    return limit, less


def _instructions(figures: Figures) -> int:
    return sum(part.instructions for part in figures.code.segments)


def write(rows: Iterable[tuple[Binary, str, int, Figures]], path: Path = TABLE) -> int:
    """Write the rows of binaries, each for a target and under a limit of registers, in place of their targets' rows.

    Returns:
        How many rows were written.
    """
    lines: dict[tuple[str, str, str], tuple[str, ...]] = {}
    for binary, target, limit, figures in rows:
        code = ";".join(" ".join(map(str, segment)) for segment in figures.code.segments)
        numbers = limit, figures.registers, figures.shared
        lines[target, binary.name, form_of(binary)] = (*map(str, numbers), code)
    targets = {target for target, _, _ in lines}
    if path.exists():
        with path.open(newline="") as file:
            for target, kernel, form, *needs in list(csv.reader(file))[1:]:
                if target not in targets:
                    lines[target, kernel, form] = tuple(needs)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((*name, *needs) for name, needs in sorted(lines.items()))
    return sum(target in targets for target, _, _ in lines)
