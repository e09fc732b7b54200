"""How many blocks of a binary a multiprocessor holds at once, and what keeps more of them out."""

from __future__ import annotations

from typing import NamedTuple

from fusedres.compiler.targets import TARGETS

SCHEDULERS = 4
# Of a multiprocessor of NVIDIA's; registers are handed out to a warp in so many.
REGISTERS, REGISTER_STEP, MOST_BLOCKS = 65536, 256, 32
RESERVED_SHARED = 1024  # of each block, by CUDA
# Of a SIMD of AMD's: registers for each lane, and waves, of 64 lanes and of 32.
_SIMD_REGISTERS, _SIMD_WAVES = {64: 512, 32: 1536}, {64: 8, 32: 16}


class Occupancy(NamedTuple):
    """Blocks side by side on a multiprocessor, and what keeps more of them out."""

    blocks: int
    limit: str


def occupancy(warps: int, registers: int, shared: int, target: str) -> Occupancy:
    """Of blocks of ``warps`` warps, with ``registers`` a thread and ``shared`` bytes of shared memory."""
    backend, arch, lanes, most, _ = TARGETS[target]
    if backend == "hip":
        waves = SCHEDULERS * min(_SIMD_WAVES[lanes], _SIMD_REGISTERS[lanes] // max(registers, 1))
        limits = {
            "registers": waves // warps,
            "shared memory": most // max(shared, 1),
            "warps": SCHEDULERS * _SIMD_WAVES[lanes] // warps,
        }
    else:
        step = -(-registers * lanes // REGISTER_STEP) * REGISTER_STEP
        limits = {
            "registers": REGISTERS // (max(step, 1) * warps),
            "shared memory": (most + RESERVED_SHARED) // (shared + RESERVED_SHARED),
            "warps": (64 if arch in (80, 90, 100) else 48) // warps,
        }
    limits["blocks"] = MOST_BLOCKS
    limit = min(limits, key=lambda name: limits[name])
    return Occupancy(max(1, limits[limit]), limit)


def registers_for(blocks: int, warps: int) -> int:
    """The most registers a thread of NVIDIA's may have where so many blocks of ``warps`` warps share them."""
    per_warp = REGISTERS // (blocks * warps) // REGISTER_STEP * REGISTER_STEP
    return per_warp // 32
