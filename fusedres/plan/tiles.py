"""How kernels that pass over rows of pixels cut them: pure functions of shape and dtype, and a way to pin a choice."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from fusedres.compiler.targets import Target
from fusedres.context import context, here
from fusedres.plan.decisions import TILE, taken
from fusedres.plan.shapes import NARROWEST, Compiled, InParts, Pipelined, narrow_waves, power_above

AnyTile = TypeVar("AnyTile")

# Pieces of a row, where one of them divides the channels. Otherwise a tile holds whole rows, which lie one after the
# other in memory: lanes may be idle, but no access begins in the middle of a sector.
PIECES = (128, 64)
WIDEST_ROW = 2048
# Programs that share a reduction: several for every multiprocessor of the largest GPUs, few enough partial sums.
PROGRAMS = 512
# Of more partial sums, and a convolution has thousands of tiles, a program takes eight channels (a sector) at a time.
FEW_PARTS = 512


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


def partial_tile(parts: int) -> PartialTile:
    """The tile for so many partial sums: the loads of a step are under way together, and few steps follow another."""
    return PartialTile() if parts <= FEW_PARTS else PartialTile(1024, 8, num_warps=8)


@dataclass(frozen=True)
class AddedTile(Compiled):
    """``block`` neighbouring values of partial results that are added up, ``block_parts`` at a time."""

    block_parts: int = 16
    block: int = 256
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


# Where there are no matrix units for fp32, products are unrolled.
UNROLLED = "ieee"
# Loads of a program that adds partial matrices, all under way at once.
ADDED_ELEMENTS = 4096


@dataclass(frozen=True)
class GramTile(Compiled):
    """``block_c`` x ``block_c`` of a Gram matrix, added up from ``block_parts`` parts at a time, for ``block_k``
    outputs of each of ``k_pieces`` at a time."""

    block_c: int
    block_parts: int
    block_k: int
    k_pieces: int
    num_warps: int = 4

    def steps(self, outputs: int) -> int:
        """Through the outputs of a piece."""
        return -(-outputs // (self.k_pieces * self.block_k))


def gram_tile(pairs: int, side: int, parts: int, outputs: int, precision: str | None) -> GramTile:
    """How ``pairs`` tiles of ``side`` channels in ``parts`` are added up, and multiplied with weights of ``outputs``
    in a ``precision`` of `fp32_dot`, if with any."""
    block_c, block_k = side, 32 if precision == UNROLLED else 64
    while pairs * (side // block_c) ** 2 < PROGRAMS // 4 and block_c > NARROWEST:
        block_c //= 2
    k_pieces = max(1, min(-(-outputs // block_k), PROGRAMS // (pairs * (side // block_c) ** 2)))
    return GramTile(block_c, max(1, min(ADDED_ELEMENTS // block_c**2, power_above(parts))), block_k, k_pieces)


@dataclass(frozen=True)
class WeightRowsTile(Compiled):
    """``block_k`` whole rows of ``block_c`` values of a weight's gradient, from ``block_parts`` parts at a time."""

    block_k: int
    block_c: int
    block_parts: int
    num_warps: int = 4


def weight_rows_tile(parts: int, outputs: int, row: int) -> WeightRowsTile:
    """How (outputs, row) weight gradients in ``parts`` are added up where sums along whole rows are wanted."""
    block_c = power_above(row)
    block_k = max(1, min(ADDED_ELEMENTS // 4 // block_c, power_above(outputs) * 2 // PROGRAMS))
    return WeightRowsTile(block_k, block_c, max(1, min(ADDED_ELEMENTS // (block_k * block_c), power_above(parts))))


@dataclass(frozen=True)
class MatrixTile(Compiled):
    """``block_k`` x ``block_c`` of a product of small matrices, ``depth`` at a time; ``precision`` of `fp32_dot`."""

    block_k: int
    block_c: int
    depth: int
    precision: str
    num_warps: int = 4


def weight_precision(target: Target, dtype: torch.dtype) -> str:
    """How weights of ``dtype`` meet fp32 numbers in `fp32_dot`, which keeps the digits of both."""
    if dtype == torch.bfloat16:
        return "bf16x3"
    if target.backend != "cuda":
        return UNROLLED
    return "tf32x2" if dtype == torch.float16 else "tf32x3"


def matrix_tile(target: Target, dtype: torch.dtype) -> MatrixTile:
    """The tile of the moments form's small matrices, for weights of ``dtype``."""
    precision = weight_precision(target, dtype)
    # Larger tiles spill, sums of three products sooner.
    if precision == UNROLLED or narrow_waves(target):
        return MatrixTile(32, 32, 16, precision)
    return MatrixTile(64, 64, 16 if precision == "tf32x3" else 32, precision)


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


def chosen(
    tiles: Sequence[AnyTile], what: Callable[[], str], size: int, more: Callable[[], Iterable[AnyTile]] | None = None
) -> AnyTile:
    """The default among ``tiles``, which is the first, or what `listed` says, or what was decided.

    Args:
        tiles: the list.
        what, size, more: of the site, as of `plan.decisions.taken`.
    """
    place = here().place
    return taken(TILE, what, size, tiles, more) if place is None else tiles[min(place, len(tiles) - 1)]


def pinned(tile: RowTile) -> AbstractContextManager[None]:
    """Run every kernel over rows with this tile inside the ``with`` block, whatever the shape."""
    return context(row_tile=tile)


def row_tile(rows: int, channels: int, itemsize: int, vectors: int = 4) -> RowTile:
    """The pinned tile, or one of `row_tiles`."""
    tile: RowTile | None = here().row_tile
    tiles = row_tiles(rows, channels, itemsize, vectors)
    return tile or chosen(tiles, lambda: f"rows of {channels} x {itemsize} bytes, {vectors} vectors", rows)


def reduction_tile(rows: int, channels: int) -> RowTile:
    """The pinned tile, or one of `reduction_tiles`."""
    tile: RowTile | None = here().row_tile
    return tile or chosen(reduction_tiles(rows, channels), lambda: f"sums of {channels} channels", rows)
