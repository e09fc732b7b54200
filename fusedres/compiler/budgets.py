"""The budgets that a compiled kernel is held to."""

from __future__ import annotations

import math
import re

from fusedres.compiler.binary import ALIGNMENT, WHOLE, Binary, Specialisation
from fusedres.compiler.code import WIDE_LOAD
from fusedres.compiler.figures import WIDE_ACCESS, Figures
from fusedres.compiler.targets import TARGETS, target_named


def violations(binary: Binary, target: str, figures: Figures) -> list[str]:
    """The budgets that a binary breaks, each in words; empty if it keeps them all.

    - No register is spilled, to memory or to lanes of other registers.
    - No stack: kernels call nothing, and neither vendor's ABI asks for a frame then.
    - Shared memory within the target's limit.
    - Tensor cores multiply the matrices of kernels that multiply any.
    - Some access to global memory is 16 bytes wide wherever `owes_wide_access`.
    - Main loops load by 8 bytes and more to a thread wherever channels allow it.
    - The assembler keeps wgmma asynchronous.
    """
    limit = target_named(target).shared_bytes
    broken = []
    if figures.spill_stores or figures.spill_loads or figures.spilled_registers:
        registers = "" if figures.spilled_registers is None else f"{figures.spilled_registers} registers, "
        broken.append(f"spills {registers}{figures.spill_stores} B stored, {figures.spill_loads} B loaded")
    if figures.stack:
        broken.append(f"stack of {figures.stack} B where none is needed")
    if figures.shared > limit:
        broken.append(f"shared memory of {figures.shared} B exceeds the limit of {limit} B")
    if figures.contracts and not figures.tensor_core:
        broken.append("multiplies matrices without tensor-core instructions")
    if owes_wide_access(binary, target) and (figures.access or 0) < WIDE_ACCESS:
        broken.append(f"widest global access is {figures.access or 0} B where alignment allows {WIDE_ACCESS} B")
    if figures.narrow is not None and figures.narrow > MOST_NARROW and _owes_wide_loads(binary):
        broken.append(f"{figures.narrow:.0%} of what main loops load comes by less than {WIDE_LOAD} B at a time")
    if figures.serialised:
        broken.append(f"wgmma waits for its products one by one ({', '.join(figures.serialised)})")
    return broken


# Masks and vectors of a number per channel are narrow, and small beside activations and weights.
MOST_NARROW = 0.5


def _owes_wide_loads(binary: Binary) -> bool:
    """Whether 8 bytes of both operands lie one after the other, as far as constants show."""
    signature, constants, aligned, _ = binary.specialisation
    sizes = [_element_bytes(type_) for name, type_ in signature if type_.startswith("*") and name in aligned]
    size = min((size for size in sizes if size >= 2), default=0)
    counts = [name for name, _ in constants if name in ("C_MULTIPLE", "K_MULTIPLE")]
    # In fp32 the layouts of TF32's operands are read by single values.
    return size == 2 and bool(counts) and all(int(dict(constants)[name]) * size >= WIDE_LOAD for name in counts)


def owes_wide_access(binary: Binary, target: str) -> bool:
    """Whether nothing keeps a kernel's threads from 16-byte accesses, as far as its specialisation shows.

    That is judged by the narrowest elements, of 2 bytes or more, behind a pointer whose address 16 divides. The channel
    counts C and K (in a kernel without them, every whole number that it is given at run time) must be known to be
    multiples of 16 bytes of them; and its tile, the product of its two largest constants called BLOCK..., must have
    16 bytes for each thread; of a convolution on AMD the tile is what is read. A kernel without a tile owes nothing.
    """
    signature, constants, aligned, _ = binary.specialisation
    sizes = [_element_bytes(type_) for name, type_ in signature if type_.startswith("*") and name in aligned]
    size = min((size for size in sizes if size >= 2), default=0)
    tile = {name: value for name, value in constants if name.startswith("BLOCK")}
    if TARGETS[target].backend == "hip" and {"BLOCK_PIXELS", "BLOCK_K", "BLOCK_C"} <= tile.keys():
        del tile["BLOCK_K"]  # outputs are written as the matrix units leave them, 8 bytes to a thread
    blocks = sorted(tile.values())
    threads = binary.num_warps * TARGETS[target].warp_size
    if not blocks or math.prod(blocks[-2:]) * size < WIDE_ACCESS * threads:
        return False
    counts = [name for name, _ in signature if name in ("C", "K")]
    counts = counts or [name for name, type_ in signature if type_ in WHOLE]
    return all(_divisor(binary.specialisation, name) * size >= WIDE_ACCESS for name in counts)


def _divisor(specialisation: Specialisation, name: str) -> int:
    """A power of two known to divide a whole number, by its value, its alignment or the constant ``name``_MULTIPLE."""
    constants = dict(specialisation.constants)
    if name in constants:
        return int(constants[name]) & -int(constants[name])
    multiple = int(constants.get(f"{name}_MULTIPLE", 1))
    return max(multiple, ALIGNMENT) if name in specialisation.aligned else multiple


def _element_bytes(pointer: str) -> int:
    return max(int(re.sub(r"\D", "", pointer)) // 8, 1)
