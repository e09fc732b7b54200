"""How kernels that pass over rows of pixels cut them: pure functions of shape and dtype, and a way to pin a choice."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TypeVar

from fusedres.compiler.targets import Target
from fusedres.context import context, here
from fusedres.plan.shapes import Compiled, InParts, Pipelined, power_above

AnyTile = TypeVar("AnyTile")

# Pieces of a row, where one of them divides the channels. Otherwise a tile holds whole rows, which lie one after the
# other in memory: lanes may be idle, but no access begins in the middle of a sector.
PIECES = (128, 64)
WIDEST_ROW = 2048
# Programs that share a reduction: several for every multiprocessor of the largest GPUs, few enough partial sums.
PROGRAMS = 512
# Partial sums that one program adds up; more of them (a convolution has thousands of tiles) are combined first.
MOST_PARTS = 2048


@dataclass(frozen=True)
class RowTile(Compiled):
    """A tile of ``block_rows`` rows by ``block_c`` channels, both powers of two, worked on by ``num_warps`` warps."""

    block_rows: int
    block_c: int
    num_warps: int = 4

    def blocks(self, rows: int, channels: int) -> int:
        """Tiles that cover a (rows, channels) tensor."""
        return -(-rows // self.block_rows) * self.pieces(channels)

    def pieces(self, channels: int) -> int:
        """Tiles side by side that cover a row."""
        return -(-channels // self.block_c)

    def parts(self, rows: int, channels: int) -> tuple[int, int]:
        """For a reduction over the rows: into how many parts they are cut (at least one), and the rows of each."""
        wanted = max(1, min(-(-rows // self.block_rows), PROGRAMS // self.pieces(channels)))
        per_part = max(1, -(-rows // wanted // self.block_rows)) * self.block_rows
        return max(1, -(-rows // per_part)), per_part


@dataclass(frozen=True)
class PartialTile(Compiled):
    """How (parts, channels) partial sums are combined: ``block_parts`` at a time, ``block_c`` channels a program."""

    block_parts: int = 128
    block_c: int = 16
    num_warps: int = 4


@dataclass(frozen=True)
class MomentsTile(InParts, Pipelined):
    """A ``block_c`` x ``block_c`` piece of a Gram matrix, ``block_pixels`` rows at a time; ``parts`` of the pixels."""

    block_pixels: int
    block_c: int
    parts: int
    num_warps: int = 4
    num_stages: int = 2

    def pairs(self, channels: int) -> int:
        """Pieces on or above the diagonal."""
        pieces = -(-channels // self.block_c)
        return pieces * (pieces + 1) // 2


def moments_tile(pixels: int, channels: int, itemsize: int, target: Target) -> MomentsTile:
    """The tile of `input_moments`: as many parts as keep a large GPU busy and no more, for each writes its sums."""
    # AMD's compiler runs out of scalar registers for the masks of larger tiles; in fp32, multiplied without tensor
    # cores, their unrolled products fill any compiler's.
    side = 32 if target.backend == "hip" or itemsize == 4 else 64
    tile = MomentsTile(side, max(16, min(side, power_above(channels))), 1)
    wanted = max(1, min(-(-pixels // tile.block_pixels), PROGRAMS // 2 // tile.pairs(channels)))
    return replace(tile, parts=tile.filled_parts(pixels, wanted))


@dataclass(frozen=True)
class MatrixTile(Compiled):
    """``block_k`` x ``block_c`` of a product of small fp32 matrices; ``precision`` of `tl.dot`."""

    block_k: int
    block_c: int
    precision: str
    num_warps: int = 8


def matrix_tile(target: Target) -> MatrixTile:
    """The tile of the moments form's small matrices; three TF32 products are fp32's digits on tensor cores."""
    precision = "tf32x3" if target.backend == "cuda" else "ieee"
    # Compilers from sm_100 on leave 128 registers to a thread, and spill where a tile is higher or warps are many.
    if target.backend == "cuda" and int(target.arch) >= 100:
        return MatrixTile(16, 32, precision, num_warps=4)
    return MatrixTile(32, 32, precision)


def row_tiles(rows: int, channels: int, itemsize: int, vectors: int = 4) -> tuple[RowTile, ...]:
    """Tiles for one pass over a (rows, channels) tensor of ``itemsize`` bytes an element, the default first.

    Each thread of the default holds as many 16-byte ``vectors`` of a tensor: four, so that enough loads are under way
    to hide memory's latency at a few warps per scheduler; two where a kernel loads several of them for each that it
    writes. A small tensor is cut finer.
    """
    return _tiles(rows, channels, vectors * 16 // itemsize)


def reduction_tiles(rows: int, channels: int) -> tuple[RowTile, ...]:
    """Tiles for a reduction over the rows of a (rows, channels) tensor, the default first: 16 sums to a thread."""
    return _tiles(rows, channels, 16)


def _tiles(rows: int, channels: int, per_thread: int) -> tuple[RowTile, ...]:
    row = max(8, min(power_above(channels), WIDEST_ROW))
    block_c = next((piece for piece in PIECES if channels % piece == 0), row)
    default = RowTile(max(1, min(4 * 32 * per_thread // block_c, power_above(rows))), block_c)
    others = [
        replace(default, block_rows=2 * default.block_rows, num_warps=8),
        replace(default, block_rows=max(1, default.block_rows // 2)),
    ]
    return tuple(dict.fromkeys([default, *others]))


def alignment(*lengths: int | None) -> int:
    """The largest power of two up to 16 that divides numbers of channels, and the distances of rows where one is given:
    what a kernel may assume of addresses."""
    return math.gcd(16, *(length for length in lengths if length is not None))


# Lists of tiles have no more of them.
MOST_TILES = 4


def listed(place: int) -> AbstractContextManager[None]:
    """Take the tile at a place of every list inside the ``with`` block, or its last where it is shorter."""
    return context(place=place)


def chosen(tiles: Sequence[AnyTile]) -> AnyTile:
    """The default among ``tiles``, which is the first, or what `listed` says."""
    place = here().place
    return tiles[0 if place is None else min(place, len(tiles) - 1)]


def pinned(tile: RowTile) -> AbstractContextManager[None]:
    """Run every kernel over rows with this tile inside the ``with`` block, whatever the shape."""
    return context(row_tile=tile)


def row_tile(rows: int, channels: int, itemsize: int, vectors: int = 4) -> RowTile:
    """The pinned tile, or one of `row_tiles`."""
    tile: RowTile | None = here().row_tile
    return tile or chosen(row_tiles(rows, channels, itemsize, vectors))


def reduction_tile(rows: int, channels: int) -> RowTile:
    """The pinned tile, or one of `reduction_tiles`."""
    tile: RowTile | None = here().row_tile
    return tile or chosen(reduction_tiles(rows, channels))
