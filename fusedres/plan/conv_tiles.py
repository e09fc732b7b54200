"""How convolutions are cut into tiles: a pure function of shape, dtype and target; and a way to pin a choice."""

import functools
import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from fusedres.compiler.targets import Target
from fusedres.context import context, here
from fusedres.plan import spills
from fusedres.plan.gpus import target_gpu
from fusedres.plan.shapes import (
    NARROWEST,
    OUTSIDE,
    WARPS_OF_ALL_REGISTERS,
    ConvVariant,
    InParts,
    Pipelined,
    halves,
    most_parts,
    neighbours,
    other_parts,
    power_above,
    site_of,
    wide,
)
from fusedres.plan.tiles import chosen

# Below this many tiles a GPU has multiprocessors without one, and smaller tiles are worth their extra loads.
ENOUGH_TILES = 256
MOST_STAGES = 4
# Pixels of a tile, and of the one for small tensors; its channels are no more. AMD's compiler keeps a mask for every
# row of a thread in scalar registers: of 128 x 64 of a window it had no place for 20 to 49 of them (Triton 3.8).
HEIGHTS = {"cuda": (128, 64), "hip": (64, 32)}
# Outputs that four warps keep the sums of, with registers left for what they multiply.
OF_FOUR_WARPS = 128 * 128 - 1
# Channels of groups that are contracted together, at least.
LEAST_TOGETHER = 32
# Of long products' rate, what a weight gradient's reaches.
WEIGHT_GRAD_REACHED = 0.4
# More of them leave no multiprocessor idle that fewer would.
MOST_WAVES = 4
# Parts that are no matter, however large.
FEW_PARTS = 4
# Where tuning has a choice, in 16 bits: on these every tile that is listed has been compiled without a spill.
TUNED = (80, 90)


@dataclass(frozen=True)
class ConvTile(Pipelined):
    """``block_pixels`` x ``block_k`` outputs a program, ``block_c`` deep a step, ``num_stages`` steps under way.

    ``groups_per_tile``: narrow groups are contracted several at a time, as a block-diagonal matrix.
    """

    block_pixels: int
    block_k: int
    block_c: int
    num_warps: int
    num_stages: int
    groups_per_tile: int = 1
    registers: int = 0

    @property
    def outputs(self) -> int:
        """Of a program."""
        return self.block_pixels * self.block_k

    def pieces(self, conv: ConvVariant) -> int:
        """Tiles side by side that cover a pixel's channels."""
        per_group = -(-self.groups_per_tile * conv.k // self.block_k)
        return -(-conv.groups // self.groups_per_tile) * per_group

    def tiles(self, conv: ConvVariant) -> int:
        """Tiles along the pixels."""
        return -(-conv.pixels // self.block_pixels)

    def steps(self, conv: ConvVariant) -> int:
        """Of a program's loop."""
        return conv.taps * self.depth_steps(min(self.groups_per_tile, conv.groups) * conv.c)

    def depth_steps(self, channels: int) -> int:
        """Of a loop over channels."""
        return -(-channels // self.block_c)

    def stage_bytes(self, conv: ConvVariant) -> int:
        """Shared memory of one step's operands."""
        return (conv.operands * self.block_pixels + self.block_k) * self.block_c * conv.itemsize


def conv_tiles(conv: ConvVariant, target: Target) -> tuple[ConvTile, ...]:
    """Tiles for a convolution, the default first; the others are what tuning tries.

    As large as the outputs allow, since a tile of m x n outputs loads (m + n) / (m n) operands for each
    multiplication, unless that leaves a large GPU idle, and as compilers hold without a spill (`spills`).
    """
    ordered, widest = _fitting(conv._replace(pixels=0), target)
    default = next((tile for tile in ordered if tile.tiles(conv) * tile.pieces(conv) >= ENOUGH_TILES), ordered[-1])
    listed = ordered if target.arch in TUNED and conv.itemsize == 2 else ()
    return tuple(dict.fromkeys([default, *listed, *widest]))


@functools.lru_cache(maxsize=4096)
def _fitting(conv: ConvVariant, target: Target) -> tuple[tuple[ConvTile, ...], tuple[ConvTile, ...]]:
    """The tiles to choose from whatever the pixels, the largest first; and the widest, which is for tuning alone."""
    together = 1
    while together < conv.groups and together * min(conv.c, conv.k) < LEAST_TOGETHER:
        together *= 2
    block_c, heights = _step(conv, together), HEIGHTS[target.backend]
    for block_k in halves(max(NARROWEST, min(power_above(together * conv.k), heights[0]))):
        sizes = [(height, block_k) for height in heights]
        ordered = [tile for size in sizes for tile in _held(size, block_c, together, conv, target)]
        if ordered:
            break
    if block_k == 128:
        ordered += _held((64, 64), block_c, together, conv, target)
    # Where tensor cores read from shared memory.
    widest = together * conv.k >= 256 and target.arch == 90
    return tuple(ordered), tuple(_held((128, 256), block_c, together, conv, target) if widest else ())


def _step(conv: ConvVariant, together: int) -> int:
    """The longest step, a line of the cache deep: half of it where that divides the depth and the whole does not."""
    depth = together * conv.c
    block_c = max(NARROWEST, min(power_above(depth), 128 // conv.itemsize))
    halved = depth % block_c and depth % (block_c // 2) == 0 and block_c > 2 * NARROWEST
    return block_c // 2 if halved else block_c


def _held(size: tuple[int, int], block_c: int, together: int, conv: ConvVariant, target: Target) -> list[ConvTile]:
    """The tile of a size with the fewest warps, the longest step and the deepest pipeline that is held, or none."""
    # Eight warps would stand 2 x 4 and form an operand four times over.
    formed = conv.prologue and not wide(target)
    for num_warps, step in itertools.product((4, 8), halves(block_c)):
        tile = ConvTile(*size, step, num_warps, 1, together)
        if num_warps == 4 and tile.outputs > OF_FOUR_WARPS and not formed:
            continue
        for stages in _depths(tile, conv, target):
            deep = replace(tile, num_stages=stages)
            if not any(row.excludes(conv, target, deep) for row in spills.CONV_SPILLS):
                return [deep]
    return []


def _depths(tile: ConvTile, conv: ConvVariant, target: Target) -> Iterator[int]:
    """Steps under way that shared memory has room for beside a second tile on the same multiprocessor, then fewer."""
    # Where operands pass through registers, so many outputs have the multiprocessor for themselves.
    shared_by_two = tile.outputs < 128 * 128 or (tile.outputs == 128 * 128 and wide(target))
    room = target.shared_bytes // 2 if shared_by_two else target.shared_bytes
    stages = max(2, min(MOST_STAGES, room // tile.stage_bytes(conv)))
    while stages > 1 and stages * tile.stage_bytes(conv) > target.shared_bytes:
        stages -= 1
    return iter(range(stages, min(stages, 2) - 1, -1))


def packs_pixels(conv: ConvVariant, target: Target) -> bool:
    """Whether kernels run a convolution of few channels, ``conv`` over its packed pixels; else the library does.

    Up to half of its products are with zeros, which tensor cores make while they wait for memory anyway.
    """
    return conv.itemsize == 2 or target.backend == "cuda"


@dataclass(frozen=True)
class WeightGradTile(InParts, Pipelined):
    """``block_k`` x ``block_c`` weights of so many ``taps`` a program, ``block_pixels`` at a time, of one of ``parts``
    of the pixels."""

    block_pixels: int
    block_k: int
    block_c: int
    num_warps: int
    num_stages: int
    parts: int
    groups_per_tile: int = 1
    taps: int = 1
    registers: int = 0

    def pieces(self, conv: ConvVariant) -> int:
        """Tiles side by side that cover the weight."""
        columns = conv.taps // self.taps * -(-self.width(conv) // self.block_c)
        return columns * -(-conv.groups * conv.k // self.block_k)

    def width(self, conv: ConvVariant) -> int:
        """Columns that the tiles of a tap cover."""
        return self.groups_per_tile * conv.c

    def side_by_side(self, conv: ConvVariant, target: Target) -> int:
        """Programs that a multiprocessor has room for."""
        loaded = conv.operands * self.block_k + self.block_c + (self.taps - 1) * max(self.block_k, self.block_c)
        stage = loaded * self.block_pixels * conv.itemsize
        by_registers = max(1, WARPS_OF_ALL_REGISTERS // self.num_warps)
        return max(1, min(by_registers, target.shared_bytes // (self.num_stages * stage)))

    def rows_at_once(self, columns: int, conv: ConvVariant, target: Target) -> int:
        """Pixels of so many columns that all threads hold, if each has 16 bytes; AMD's have no registers for sums of
        each."""
        if target.backend != "cuda":
            return 1
        return max(1, min(self.block_pixels, self.num_warps * target.warp_size * 16 // conv.itemsize // columns))

    def turned(self, conv: ConvVariant, target: Target) -> bool:
        """Whether u is the left operand and dy, which is formed, the right one: wgmma takes a left operand that was
        formed from registers, which it would have to be transposed in."""
        return target.arch == 90 and conv.itemsize == 2 and conv.operands > 1

    def whole_columns(self, conv: ConvVariant) -> bool:
        """Whether every tile's columns exist."""
        return self.width(conv) % self.block_c == 0 and conv.groups % self.groups_per_tile == 0


def weight_grad_tiles(conv: ConvVariant, target: Target) -> tuple[WeightGradTile, ...]:
    """Tiles for the gradient of a weight, the default first; empty where groups do not fit into tiles.

    The pixels are cut into parts so that the device's multiprocessors are busy in whole waves.
    """
    tiles = _fitting_weights(conv._replace(pixels=0), target)
    return tuple(replace(tile, parts=_parts(tile, conv, target)) for tile in tiles)


@functools.lru_cache(maxsize=4096)
def _parts(tile: WeightGradTile, conv: ConvVariant, target: Target) -> int:
    gpu, pieces = target_gpu(target), tile.pieces(conv)
    weights = conv.groups * conv.k * conv.taps * conv.c
    read = conv.pixels * conv.groups * (conv.operands * conv.k + conv.c) * conv.itemsize
    dtype = torch.bfloat16 if conv.itemsize == 2 else torch.float32
    product = 2 * conv.pixels * weights / (WEIGHT_GRAD_REACHED * gpu.rate(dtype, tf32=True))
    # Parts are fp32, written and read.
    part = 2 * 4 * weights / gpu.bandwidth / max(product, read / gpu.bandwidth, 1e-9)
    wave = target.multiprocessors * tile.side_by_side(conv, target)
    most = min(
        -(-conv.pixels // (OUTSIDE * tile.block_pixels)),
        -(-MOST_WAVES * wave // pieces),
        # Beyond those that give every multiprocessor one, written and read, half of what the contraction reads.
        max(FEW_PARTS, target.multiprocessors // pieces, read // (16 * max(1, weights))),
        most_parts(conv),
    )
    return tile.whole_waves(conv.pixels, pieces, wave, most, part)


@functools.lru_cache(maxsize=4096)
def _fitting_weights(conv: ConvVariant, target: Target) -> tuple[WeightGradTile, ...]:
    """The tiles to choose from whatever the pixels, of one part."""
    for taps in (_shared_taps(conv, target), 1):
        tiles = _fitting_taps(conv, target, taps)
        if tiles:
            return tiles
    return ()


def _shared_taps(conv: ConvVariant, target: Target) -> int:
    """Taps of a program that form an operand once, or read it once, for all of them: a row of the window."""
    if target.backend != "cuda" or conv.itemsize != 2 or conv.groups > 1:
        return 1
    if conv.s == 1:  # of packed pixels, whose rows are one tap
        most = 4 if wide(target) else 2
        return next(taps for taps in (4, 3, 2, 1) if taps <= most and conv.r % taps == 0)
    # Elsewhere their sums leave no registers for what is formed, and where dy is formed it is the left operand of each
    # product, which goes from registers to wgmma three times.
    return conv.s if target.arch == 90 and conv.operands == 1 and conv.s <= 3 else 1


def _fitting_taps(conv: ConvVariant, target: Target, taps: int) -> tuple[WeightGradTile, ...]:
    # What the taps share may be twice as wide as what each has.
    widest_k = 128 if conv.k >= 128 and (conv.c >= 128 if taps == 1 else taps < 4 and not conv.copied) else 64
    widest_c = 128 if conv.c >= 128 and (conv.k >= 128 if taps == 1 else taps < 4 and conv.copied) else 64
    for block_k in halves(max(NARROWEST, min(power_above(conv.k * conv.groups), widest_k))):
        if conv.groups > 1 and conv.k % block_k and block_k % conv.k:
            continue
        together = max(1, block_k // conv.k) if conv.groups > 1 else 1
        tile = WeightGradTile(NARROWEST, block_k, NARROWEST, 4, 2, 1, together, taps)
        columns = max(NARROWEST, min(power_above(tile.width(conv)), widest_c))
        for block_c, step, num_warps in itertools.product(halves(columns), (64, 32, 16), (4, 8)):
            tile = replace(tile, block_c=block_c, block_pixels=step, num_warps=num_warps)
            if num_warps == 4 and taps * block_k * block_c > OF_FOUR_WARPS:
                continue
            if not any(row.excludes(conv, target, tile) for row in spills.WEIGHT_GRAD_SPILLS):
                shorter = step == 64 and target.arch in TUNED and conv.itemsize == 2
                return (tile, replace(tile, block_pixels=32)) if shorter else (tile,)
    return ()


def pinned(tile: ConvTile) -> AbstractContextManager[None]:
    """Run every convolution and input gradient with this tile inside the ``with`` block, whatever the shape."""
    return context(conv_tile=tile)


def conv_tile(conv: ConvVariant, target: Target) -> ConvTile:
    """The pinned tile, or one of `conv_tiles`."""
    tile: ConvTile | None = here().conv_tile
    if tile is not None:
        return tile
    tiles = conv_tiles(conv, target)

    def more() -> Iterator[ConvTile]:
        for one in tiles:
            yield from neighbours(one, target, target.shared_bytes // one.stage_bytes(conv))

    return chosen(tiles, lambda: site_of("convolution", conv), conv.pixels, more)


def weight_grad_tile(conv: ConvVariant, target: Target) -> WeightGradTile | None:
    """One of `weight_grad_tiles`; None where groups do not fit into tiles."""
    tiles = weight_grad_tiles(conv, target)
    if not tiles:
        return None

    def more() -> Iterator[WeightGradTile]:
        for one in tiles:
            yield from neighbours(one, target, MOST_STAGES)
            yield from other_parts(one)

    tile = chosen(tiles, lambda: site_of("weight gradient", conv), conv.pixels, more)
    return replace(tile, parts=tile.filled_parts(conv.pixels, min(tile.parts, most_parts(conv))))
