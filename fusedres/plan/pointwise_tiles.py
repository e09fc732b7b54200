"""Which 1x1 convolutions a few blocks go through with tensor descriptors, and in which tiles: a function of shape,
dtype and target; and a way to pin a choice."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from fusedres.compiler.targets import Target, triton_version
from fusedres.context import context, here
from fusedres.plan.decisions import TILE, taken
from fusedres.plan.shapes import (
    ConvVariant,
    Pipelined,
    neighbours,
    other_parts,
    power_above,
    site_of,
    tensor_memory,
    wide,
)

# What a row of memory that a descriptor describes is a multiple of, in bytes, and where its tensor begins.
DESCRIBED = 16
# From the first on compilers keep tensor maps in memory that the launcher brings; for sm_120 those before the second
# let every kernel with a descriptor store 32 bytes to a stack.
OLDEST_TRITON, OLDEST_FOR_SM_120 = (3, 6), (3, 8)
# A block's columns of the weight, and its tiles of the input, wait in shared memory whole; what is formed of them waits
# in registers, beside the weight where tensor cores read that there too.
DEEPEST, DEEPEST_FORMED, DEEPEST_FORMED_NARROW = 512, 128, 64
# Outputs of eight warps, few enough that sums of all of them fit into registers of which two blocks have their half;
# fewer of deep columns.
OUTPUTS, WIDEST, DEEP = 64 * 128, 128, 256
# Tiles of a block, which ends with a tail of three times a tile's instructions.
LEAST_STEPS = 4
MOST_STAGES = 4


@dataclass(frozen=True)
class PointwiseTile(Pipelined):
    """``block_pixels`` x ``block_k`` outputs a step, all of C deep; ``parts`` blocks take turns along the pixels."""

    block_pixels: int
    block_k: int
    block_c: int
    num_warps: int
    num_stages: int
    parts: int
    registers: int = 0

    def pieces(self, conv: ConvVariant) -> int:
        """Tiles side by side that cover a pixel's channels."""
        return -(-conv.k // self.block_k)

    def steps(self, conv: ConvVariant) -> int:
        """Tiles of the block that has most."""
        return -(-conv.pixels // (self.block_pixels * self.parts))


def has_descriptors(target: Target) -> bool:
    """Whether a kernel for a GPU moves tiles by tensor descriptors."""
    if target.backend != "cuda" or int(target.arch) < 90:
        return False
    return triton_version() >= (OLDEST_FOR_SM_120 if int(target.arch) >= 120 else OLDEST_TRITON)


def pointwise_tiles(conv: ConvVariant, target: Target) -> tuple[PointwiseTile, ...]:
    """The tile of a 1x1 convolution of neighbouring pixels; none where tiles of their own blocks serve better."""
    deepest = DEEPEST
    if conv.prologue:
        deepest = DEEPEST_FORMED if wide(target) else DEEPEST_FORMED_NARROW
    if not has_descriptors(target) or conv.itemsize != 2 or conv.taps > 1 or conv.groups > 1 or conv.c > deepest:
        return ()
    block_c = max(16, power_above(conv.c))
    block_k = max(16, min(power_above(conv.k), WIDEST if block_c < DEEP else WIDEST // 2))
    block_pixels = min(128, OUTPUTS // block_k) if block_c < DEEP else 64
    tiles = -(-conv.pixels // block_pixels)
    # Of outputs that wait to be written, and of those that were brought from the accumulators' own memory.
    outputs = 2 * block_pixels if tensor_memory(target) else block_pixels
    # Two blocks of a multiprocessor work while the other one waits; the deepest columns leave room for one.
    for blocks in (2, 1):
        room = target.shared_bytes // blocks - conv.itemsize * block_k * (block_c + outputs)
        stages = min(MOST_STAGES, room // (conv.itemsize * block_c * block_pixels))
        parts = max(1, blocks * target.multiprocessors // -(-conv.k // block_k))
        if stages >= 2 and tiles >= LEAST_STEPS * parts:
            return (PointwiseTile(block_pixels, block_k, block_c, 8, stages, parts),)
    return ()


def pinned(tile: PointwiseTile) -> AbstractContextManager[None]:
    """Run every 1x1 convolution that can with this tile inside the ``with`` block, whatever the shape."""
    return context(pointwise_tile=tile)


def pointwise_tile(conv: ConvVariant, target: Target) -> PointwiseTile | None:
    """The pinned tile, or the plan's as the default; None where there is none, or where another was chosen by hand."""
    tile: PointwiseTile | None = here().pointwise_tile
    if tile is not None or here().conv_tile is not None or here().place not in (None, 0):
        return tile
    tiles = pointwise_tiles(conv, target)
    if not tiles:
        return None
    own = tiles[0]

    def more() -> Iterator[PointwiseTile]:
        yield from neighbours(own, target, MOST_STAGES)
        yield from other_parts(own)

    what = "convolution of single pixels"
    tile = taken(TILE, lambda: site_of(what, conv), conv.pixels, [own, None], more)
    if tile is None:
        return None
    most = -(-conv.pixels // tile.block_pixels) // LEAST_STEPS
    return replace(tile, parts=min(tile.parts, most)) if most else None
