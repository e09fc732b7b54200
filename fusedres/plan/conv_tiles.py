"""How convolutions are cut into tiles: a pure function of shape, dtype and target; and a way to pin a choice."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..offline import Target
from .tiles import chosen, on_top, power_above

# Below this many tiles a GPU has multiprocessors without one, and smaller tiles are worth their extra loads.
ENOUGH_TILES = 256
MOST_STAGES = 4
# Elements of a weight gradient's tiles, all parts together: each is written and read once more, which at 16 MB was a
# tenth of what ResNet-50's step moves. Of the widest tile it is one for every multiprocessor.
PARTIAL_ELEMENTS = 1 << 21
# Programs of a weight gradient, one for every multiprocessor of large GPUs; up to `ENOUGH_TILES` of them while their
# parts, written and read once more, are less than half of what the contraction reads.
FILLING = 128
# Where tuning has a choice, in 16 bits: on these every tile that is listed has been compiled without a spill.
TUNED = (80, 90)
# The narrowest side of a tile that tensor cores multiply on every target.
NARROWEST = 16


class ConvShape(NamedTuple):
    """What the choice depends on: output pixels, channels of a group, groups, window, bytes of an element.

    ``flat``: depth runs along the rows of the window. ``prologue``: the left operand is formed on load, of so many
    tensors (``operands``). ``second``: a projection is contracted after the convolution, whose outputs wait in
    registers. ``joined``: bytes of a value that is joined to the outputs (of a shortcut, a mask, features' gradient).
    ``gradient``: of the input; ``c`` are the channels of the convolution's output and ``k`` those of its input then.
    """

    pixels: int
    c: int
    k: int
    groups: int
    r: int
    s: int
    itemsize: int
    flat: bool = False
    prologue: bool = False
    second: bool = False
    joined: int = 0
    operands: int = 1
    gradient: bool = False


@dataclass(frozen=True)
class ConvTile:
    """``block_pixels`` x ``block_k`` outputs a program, ``block_c`` deep a step, ``num_stages`` steps under way.

    ``groups_per_tile``: narrow groups are contracted several at a time, as a block-diagonal matrix.
    """

    block_pixels: int
    block_k: int
    block_c: int
    num_warps: int
    num_stages: int
    groups_per_tile: int = 1

    def pieces(self, shape: ConvShape) -> int:
        """Tiles side by side that cover a pixel's channels."""
        per_group = -(-self.groups_per_tile * shape.k // self.block_k)
        return -(-shape.groups // self.groups_per_tile) * per_group

    def tiles(self, shape: ConvShape) -> int:
        """Tiles along the pixels."""
        return -(-shape.pixels // self.block_pixels)

    def stage_bytes(self, shape: ConvShape) -> int:
        """Shared memory of one step's operands."""
        return (shape.operands * self.block_pixels + self.block_k) * self.block_c * shape.itemsize


def depthwise(shape: ConvShape) -> bool:
    """Whether a group has too few channels for tensor cores to gain by packing groups side by side."""
    return shape.groups > 1 and shape.c * shape.k < 4


def conv_tiles(shape: ConvShape, target: Target) -> tuple[ConvTile, ...]:
    """Tiles for a convolution, the default first; the others are what tuning tries.

    As large as the outputs allow, since a tile of m x n outputs loads (m + n) / (m n) operands for each
    multiplication, unless that leaves a large GPU idle. The depth of the pipeline is what shared memory has room for
    beside a second tile on the same multiprocessor.
    """
    packed = 1
    while packed < shape.groups and min(packed * shape.c, packed * shape.k) < 32:
        packed *= 2
    depth = packed * shape.c if not shape.flat else shape.r * shape.s * shape.c
    block_k = max(NARROWEST, min(power_above(packed * shape.k), 128))
    widest_step = 128 // shape.itemsize  # a row of operands is a line of the cache
    block_c = max(NARROWEST, min(power_above(depth), widest_step))
    if depth % block_c and depth % (block_c // 2) == 0 and block_c > 2 * NARROWEST:
        block_c //= 2
    if shape.flat:
        block_c = 32
    amd = target.backend == "hip"
    if amd and (shape.second or (shape.gradient and narrow_waves(target))):
        # Without matrix units, as for fp32 on narrow waves, the unrolled products of 32 spill up to 72 bytes.
        block_c = min(block_c, 16 if narrow_waves(target) and shape.itemsize > 2 else 32)
    # The second contraction of a gradient adds to the same sums.
    apart = shape.second and not shape.gradient
    # In fp32 what is joined to 128 x 128 of a gradient, and the gradient, spill 76 bytes where they fit in 16 bits; the
    # features' gradients that it is added to spill 24.
    if amd or apart or (shape.gradient and (shape.itemsize > 2 or shape.joined or not wide(target))):
        block_k = min(block_k, 64)
    if apart and amd and shape.itemsize > 2:
        block_k = min(block_k, 32)  # the outputs that wait, beside fp32 operands, spill up to 72 bytes
    sizes = [(128, block_k), (64, block_k)]
    if amd:
        # Its compiler keeps a mask for every row of a thread in scalar registers, and runs out of them.
        sizes = [(64, block_k), (32, block_k)][shape.prologue or shape.second or shape.flat :]
    if block_k == 128:
        sizes.append((64, 64))
        # What is joined, or contracted second, to 128 x 128 on sm_100 spills up to 20 bytes; a window in TF32 on sm_120
        # 36.
        window = target.arch == 120 and shape.r * shape.s > 1 and shape.itemsize > 2 and not shape.gradient
        if window or (tensor_memory(target) and (shape.joined or shape.second)):
            sizes = sizes[1:]
    ordered = [_tile(size, block_c, packed, shape, target) for size in sizes]
    default = next((tile for tile in ordered if tile.tiles(shape) * tile.pieces(shape) >= ENOUGH_TILES), ordered[-1])
    others = list(ordered) if target.arch in TUNED and shape.itemsize == 2 else []
    # The widest tile where tensor cores read from shared memory; what is joined finds no registers beside it, nor does
    # what is formed in fp32.
    alone = not (shape.second or shape.joined or shape.gradient or (shape.prologue and shape.itemsize > 2))
    if packed * shape.k >= 256 and target.arch == 90 and alone:
        others.append(_tile((128, 256), block_c, packed, shape, target))
    return tuple(dict.fromkeys([default, *others]))


def _tile(size: tuple[int, int], block_c: int, packed: int, shape: ConvShape, target: Target) -> ConvTile:
    # In the registers of 4 warps, 128 x 128 fp32 accumulators spill; so do a mask for every element of a flat operand,
    # and a prologue where operands pass through registers.
    outputs = size[0] * size[1]
    crowded = size[0] == 128 and (shape.flat or shape.second or (shape.prologue and not wide(target)))
    crowded = crowded or ((shape.gradient or (shape.joined > 0 and tensor_memory(target))) and outputs >= 128 * 64)
    tile = ConvTile(*size, block_c, 8 if outputs >= 128 * 128 or crowded else 4, 2, packed)
    narrow = shape.itemsize == 2 and shape.joined <= 2
    if crowded and outputs == 128 * 128 and shape.r == shape.s == 1 and narrow and target.arch == 80:
        # Eight warps would stand 2 x 4 and form the operand four times over. With a shorter step four have room, by
        # the compiler for sm_80; those for sm_86, sm_89 and sm_120 spill.
        tile = replace(tile, num_warps=4, block_c=min(block_c, 32))
    # Where operands pass through registers, such a tile has the multiprocessor for itself.
    alone = outputs > 128 * 128 or (outputs == 128 * 128 and not wide(target))
    room = target.shared_bytes if alone else target.shared_bytes // 2
    most = MOST_STAGES
    if target.backend == "hip":
        # Steps wait in registers: a third spills where operands are formed, many, or of two products; a fourth of any
        # gradient.
        few = shape.prologue or shape.second or (shape.gradient and narrow_waves(target))
        most = 2 if few else 3 if shape.gradient else MOST_STAGES
    stages = max(2, min(most, room // tile.stage_bytes(shape)))
    while stages > 1 and stages * tile.stage_bytes(shape) > target.shared_bytes:
        stages -= 1
    return replace(tile, num_stages=stages)


@dataclass(frozen=True)
class WeightGradTile:
    """``block_k`` x ``block_c`` weights a program, ``block_pixels`` at a time, of one of ``parts`` of the pixels."""

    block_pixels: int
    block_k: int
    block_c: int
    num_warps: int
    num_stages: int
    parts: int
    groups_per_tile: int = 1

    def tiles(self, shape: ConvShape) -> int:
        """Tiles that cover the weight."""
        columns = (1 if shape.flat else shape.r * shape.s) * -(-self.width(shape) // self.block_c)
        return columns * -(-shape.groups * shape.k // self.block_k)

    def width(self, shape: ConvShape) -> int:
        """Columns that the tiles of a tap, or of the whole window, cover."""
        return shape.r * shape.s * shape.c if shape.flat else self.groups_per_tile * shape.c

    def whole_columns(self, shape: ConvShape) -> bool:
        """Whether every tile's columns exist."""
        return self.width(shape) % self.block_c == 0 and shape.groups % self.groups_per_tile == 0

    def per_part(self, pixels: int) -> int:
        """Pixels of a part, a multiple of ``block_pixels``."""
        return max(1, -(-pixels // self.parts // self.block_pixels)) * self.block_pixels


def weight_grad_tiles(shape: ConvShape, target: Target) -> tuple[WeightGradTile, ...]:
    """Tiles for the gradient of a weight, the default first; empty where groups do not fit into tiles.

    The pixels are cut into as many parts as keep a large GPU busy, each of several steps, but into few where the
    weight is large beside the activations.
    """
    grouped, amd, formed = shape.groups > 1, target.backend == "hip", shape.operands > 1
    # Three products of TF32 hold each operand three times: 128 x 128, or steps of 32 pixels, spill up to 448 bytes.
    tf32 = shape.itemsize > 2 and not amd
    unrolled = shape.itemsize > 2 and narrow_waves(target)  # no matrix units: 64 x 64 of 32 pixels spills 936 bytes
    widest = 128 if shape.k >= 128 and shape.c >= 128 and not narrow_waves(target) else 64
    block_k = max(NARROWEST, min(power_above(shape.k * shape.groups), 32 if unrolled else widest))
    while grouped and block_k > NARROWEST and shape.k % block_k and block_k % shape.k:
        block_k //= 2
    if grouped and shape.k % block_k and block_k % shape.k:
        return ()
    packed = max(1, block_k // shape.k) if grouped else 1
    width = shape.r * shape.s * shape.c if shape.flat else packed * shape.c
    # A whole window of few channels, so that dy is read, or formed, once: but on AMD, where every element of such a
    # tile has a mask in scalar registers.
    widest_c = (64 if amd else 128 if tf32 else 256) if shape.flat else widest
    if not shape.flat and tf32:
        widest_c = min(widest_c, 64)
    block_c = max(NARROWEST, min(power_above(width), widest_c))
    read = shape.pixels * shape.groups * (shape.operands * shape.k + shape.c) * shape.itemsize
    part = 2 * 4 * shape.groups * shape.k * shape.r * shape.s * shape.c  # fp32, written and read
    tiles = []
    most = 64 * 64 if tf32 else 128 * 128 - 1  # what four warps hold
    for block_pixels in (16,) if tf32 or unrolled else (32, 16) if shape.flat else (64, 32):
        warps = 8 if block_k * block_c > most or shape.flat else 4
        tile = WeightGradTile(block_pixels, block_k, block_c, warps, 2, 1, packed)
        covering = tile.tiles(shape)
        programs = min(
            ENOUGH_TILES, PARTIAL_ELEMENTS // (block_k * block_c), max(FILLING, covering * read // (2 * part))
        )
        wanted = max(1, min(-(-shape.pixels // (4 * block_pixels)), programs // covering))
        tile = replace(tile, parts=wanted)
        tiles.append(replace(tile, parts=max(1, -(-shape.pixels // tile.per_part(shape.pixels)))))
    # The shorter step alone where operands are wide or formed, pass through registers, or have masks by the element.
    crowded = formed or shape.flat or (block_k * block_c == 128 * 128 and not wide(target))
    ordered = tuple(tiles[-1:]) if shape.itemsize > 2 or crowded else tuple(tiles)
    return ordered if target.arch in TUNED and shape.itemsize == 2 else ordered[:1]


def narrow_waves(target: Target) -> bool:
    """Whether a wave has 32 threads on AMD: half as many share a tile, and their registers spill sooner."""
    return target.backend == "hip" and target.warp_size == 32


def tensor_memory(target: Target) -> bool:
    """Whether accumulators have a memory of their own, as those of sm_100 do."""
    return target.backend == "cuda" and isinstance(target.arch, int) and 100 <= target.arch < 120


def wide(target: Target) -> bool:
    """Whether tensor cores read their operands from shared memory, as those of sm_90 and sm_100 do."""
    return target.backend == "cuda" and isinstance(target.arch, int) and 90 <= target.arch < 120


_pinned: list[ConvTile] = []


def pinned(tile: ConvTile) -> AbstractContextManager[None]:
    """Run every forward convolution with this tile inside the ``with`` block, whatever the shape."""
    return on_top(_pinned, tile)


def conv_tile(shape: ConvShape, target: Target) -> ConvTile:
    """The pinned tile, or one of `conv_tiles`."""
    return _pinned[-1] if _pinned else chosen(conv_tiles(shape, target))
