"""What compilers can not hold in registers: a table of tiles that spilled when they were compiled.

A row says of which variants of a convolution, for which targets and by which tiles; what was seen then, and with which
Triton. `tests/plan/test_spills.py` compiles for every row what the plan would choose without it, and fails where a
compiler has learnt to hold it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from fusedres.compiler.targets import TARGETS, Target
from fusedres.plan.shapes import ConvVariant

SCALAR = "scalar registers"
"""What is seen where AMD's compiler keeps a mask for every row of a thread in them, and moves some to lanes."""


class Sized(Protocol):
    """A tile of a forward convolution, of an input's or of a weight's gradient."""

    @property
    def block_pixels(self) -> int: ...
    @property
    def block_k(self) -> int: ...
    @property
    def block_c(self) -> int: ...
    @property
    def num_warps(self) -> int: ...
    @property
    def num_stages(self) -> int: ...


@dataclass(frozen=True)
class Spill:
    """Tiles that a compiler can not hold.

    Attributes:
        name: what needs the registers.
        targets: names of those meant; a GPU that has no name of its own is taken for its `next_of_kin`.
        of: whether a variant of a convolution is meant.
        tiles: and which of its tiles.
        seen: bytes that a thread of the example in the tests stores, or `SCALAR`. None where it stores nothing with
            this compiler: earlier ones, or earlier kernels, did. Such a row stands until a GPU has timed the tiles that
            it excludes, since what it leaves has been chosen for other reasons too.
        triton: the version of the compiler.
    """

    name: str
    targets: tuple[str, ...]
    of: Callable[[ConvVariant], bool]
    tiles: Callable[[Sized], bool]
    seen: int | str | None
    triton: tuple[int, int] = (3, 8)

    def excludes(self, conv: ConvVariant, target: Target, tile: Sized) -> bool:
        return next_of_kin(target) in self.targets and self.of(conv) and self.tiles(tile)


def next_of_kin(target: Target) -> str:
    """The name in `TARGETS` of a GPU's architecture, or of the one before it, whose registers are the same."""
    alike = {name: one for name, one in TARGETS.items() if one.backend == target.backend}
    arch: Any = target.arch
    exact = [name for name, one in alike.items() if one.arch == arch]
    if exact:
        return exact[0]
    if target.backend == "cuda":
        return ["sm_80", *(name for name, one in alike.items() if int(one.arch) <= arch)][-1]
    return next(name for name, one in alike.items() if one.warp_size == target.warp_size)


NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# Those whose tensor cores take operands from registers, and from shared memory.
BY_REGISTERS, BY_SHARED = ("sm_80", "sm_86", "sm_89", "sm_120"), ("sm_90", "sm_100")
AMD, NARROW_WAVES = ("gfx90a", "gfx942", "gfx950", "gfx1100"), ("gfx1100",)


def _four_warps(least: int) -> Callable[[Sized], bool]:
    """Tiles of so many outputs and more by four warps."""
    return lambda tile: tile.num_warps == 4 and tile.block_pixels * tile.block_k >= least


def _four_warps_of_128_rows(tile: Sized) -> bool:
    return tile.num_warps == 4 and tile.block_pixels == 128


CONV_SPILLS = (
    Spill("two contractions by four warps", NVIDIA, lambda conv: conv.second, _four_warps_of_128_rows, 204),
    Spill(
        "an operand formed in registers by four warps",
        ("sm_86", "sm_89", "sm_120"),
        lambda conv: conv.prologue,
        _four_warps_of_128_rows,
        60,
    ),
    Spill(
        "an operand formed in registers by four warps, in long steps",
        ("sm_80",),
        lambda conv: conv.prologue,
        lambda tile: _four_warps_of_128_rows(tile) and (tile.block_c > 32 or tile.block_k < 128),
        20,
    ),
    Spill(
        "a window, fp32 or an fp32 shortcut beside an operand formed by four warps",
        ("sm_80",),
        lambda conv: conv.prologue and (conv.taps > 1 or conv.itemsize > 2 or conv.epilogue_bytes > 2),
        _four_warps(128 * 128),
        572,
    ),
    Spill("an input's gradient by four warps", NVIDIA, lambda conv: conv.gradient, _four_warps(128 * 64), 500),
    Spill(
        "what joins outputs of four warps", ("sm_100",), lambda conv: conv.epilogue_bytes > 0, _four_warps(128 * 64), 64
    ),
    Spill(
        "outputs that wait for a second contraction",
        NVIDIA,
        lambda conv: conv.second and not conv.gradient,
        lambda tile: tile.block_k > 64,
        260,
    ),
    Spill(
        "what joins an input's gradient in fp32",
        BY_SHARED,
        lambda conv: conv.gradient and conv.itemsize > 2,
        lambda tile: tile.block_k > 64,
        124,
    ),
    Spill(
        "features' gradients that an input's is added to",
        BY_SHARED,
        lambda conv: conv.gradient and conv.epilogue_bytes > 0,
        lambda tile: tile.block_k > 64,
        112,
    ),
    Spill(
        "an input's gradient formed in registers",
        BY_REGISTERS,
        lambda conv: conv.gradient,
        lambda tile: tile.block_k > 64,
        None,
    ),
    Spill(
        "outputs that wait beside fp32 operands",
        AMD,
        lambda conv: conv.second and not conv.gradient and conv.itemsize > 2,
        lambda tile: tile.block_k > 32,
        SCALAR,
    ),
    Spill(
        "masks for the rows of an operand",
        AMD,
        lambda conv: conv.prologue or conv.second,
        lambda tile: tile.block_pixels > 32,
        SCALAR,
    ),
    Spill(
        "a window in TF32",
        ("sm_120",),
        lambda conv: conv.itemsize > 2 and conv.taps > 1 and not conv.gradient,
        lambda tile: tile.block_pixels * tile.block_k >= 128 * 128,
        36,
    ),
    Spill(
        "what joins outputs, or is contracted second",
        ("sm_100",),
        lambda conv: conv.epilogue_bytes > 0 or conv.second,
        lambda tile: tile.block_pixels * tile.block_k >= 128 * 128,
        40,
    ),
    Spill(
        "what joins the widest tile, or is contracted second",
        ("sm_90",),
        lambda conv: conv.epilogue_bytes > 0 or conv.second or conv.gradient,
        lambda tile: tile.block_k > 128,
        312,
    ),
    Spill(
        "an operand formed in fp32 for the widest tile",
        ("sm_90",),
        lambda conv: conv.prologue and conv.itemsize > 2,
        lambda tile: tile.block_k > 128,
        8,
    ),
    Spill(
        "three steps of an operand that is formed, or of two contractions",
        AMD,
        lambda conv: conv.prologue or conv.second,
        lambda tile: tile.num_stages > 2,
        SCALAR,
    ),
    Spill(
        "three steps of an input's gradient",
        NARROW_WAVES,
        lambda conv: conv.gradient,
        lambda tile: tile.num_stages > 2,
        None,
    ),
    Spill("four steps of an input's gradient", AMD, lambda conv: conv.gradient, lambda tile: tile.num_stages > 3, None),
    Spill("long steps of two contractions", AMD, lambda conv: conv.second, lambda tile: tile.block_c > 32, 32),
    Spill(
        "long steps of an input's gradient",
        NARROW_WAVES,
        lambda conv: conv.gradient,
        lambda tile: tile.block_c > 32,
        1088,
    ),
    Spill(
        "unrolled products of two operands in fp32",
        NARROW_WAVES,
        lambda conv: (conv.gradient or conv.second) and conv.itemsize > 2,
        lambda tile: tile.block_c > 16,
        72,
    ),
)
"""Of `conv_tiles.ConvTile`."""


def _fp32(conv: ConvVariant) -> bool:
    return conv.itemsize > 2


WEIGHT_GRAD_SPILLS = (
    # Three products of TF32 hold each operand three times.
    Spill("TF32 in long steps", NVIDIA, _fp32, lambda tile: tile.block_pixels > 16, 340),
    Spill(
        "TF32 by four warps",
        NVIDIA,
        _fp32,
        lambda tile: tile.num_warps == 4 and tile.block_k * tile.block_c > 64 * 64,
        20,
    ),
    Spill("TF32 of 128 x 128", NVIDIA, _fp32, lambda tile: tile.block_c > 64, 156),
    Spill(
        "unrolled products of fp32",
        NARROW_WAVES,
        _fp32,
        lambda tile: tile.block_k > 32 or tile.block_pixels > 16,
        752,
    ),
    Spill(
        "addresses of packed pixels, or a mask's bits and sums",
        NARROW_WAVES,
        lambda conv: conv.s == 1,
        lambda tile: tile.block_pixels > 32,
        636,
    ),
    Spill("fp32 in long steps", AMD, _fp32, lambda tile: tile.block_pixels > 32, SCALAR),
    Spill(
        "128 x 128 by waves of 32 threads",
        NARROW_WAVES,
        lambda conv: True,
        lambda tile: tile.block_k > 64 or tile.block_c > 64,
        32,
    ),
    Spill(
        "an output's gradient formed in long steps",
        (*(name for name in NVIDIA if name != "sm_90"), *AMD),
        lambda conv: conv.operands > 1,
        lambda tile: tile.block_pixels > 32,
        44,
    ),
    Spill(
        "128 x 128 in long steps, operands in registers",
        (*BY_REGISTERS, *AMD),
        lambda conv: True,
        lambda tile: tile.block_pixels > 32 and tile.block_k * tile.block_c >= 128 * 128,
        SCALAR,
    ),
)
"""Of `conv_tiles.WeightGradTile`."""
