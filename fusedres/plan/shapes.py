"""What a tile is chosen for, and what tiles of several kinds have in common."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from fusedres.compiler.binary import MOST_REGISTERS
from fusedres.compiler.occupancy import registers_for
from fusedres.compiler.targets import Target
from fusedres.plan.decisions import spelt

# The narrowest side of a tile that tensor cores multiply on every target.
NARROWEST = 16
# Steps that what a program does outside of its loop over pixels takes as long as.
OUTSIDE = 4
# Warps whose registers, 255 to a thread, fill a multiprocessor.
WARPS_OF_ALL_REGISTERS = 8


class ConvVariant(NamedTuple):
    """What the choice of a tile depends on: a convolution, and what its kernel does beside it.

    Attributes:
        pixels: of the output, all images together.
        c, k: channels of input and output, of one group.
        groups: how many.
        r, s: the window.
        itemsize: bytes of an element.
        prologue: the left operand is formed on load.
        second: a projection is contracted after the convolution, whose outputs wait in registers.
        epilogue_bytes: of a value that joins the outputs (of a shortcut, a mask, features' gradient); 0 for none.
        operands: how many tensors the left operand is formed of.
        copied: of a weight's gradient: dy is nothing that is formed, at the pixels of the input, so that the taps of a
            window can share what is formed of the input; else they share dy.
        gradient: of the input; ``c`` are the channels of the convolution's output and ``k`` those of its input then.
    """

    pixels: int
    c: int
    k: int
    groups: int
    r: int
    s: int
    itemsize: int
    prologue: bool = False
    second: bool = False
    epilogue_bytes: int = 0
    operands: int = 1
    copied: bool = False
    gradient: bool = False

    @property
    def taps(self) -> int:
        """Pixels of the window."""
        return self.r * self.s


def site_of(what: str, conv: ConvVariant) -> str:
    """What a choice for a convolution is found by, whatever its pixels."""
    return f"{what} {spelt(tuple(conv._replace(pixels=0)))}"


class Compiled:
    """A tile that says how its kernel is compiled."""

    num_warps: int

    @property
    def options(self) -> dict[str, Any]:
        """What a launch is told of it, beside the kernel's arguments."""
        return {"num_warps": self.num_warps}


class Pipelined(Compiled):
    """One whose loop has ``num_stages`` steps under way; shared memory says how many fit on a multiprocessor.

    ``registers``: how many a thread may have at most; 0: what the table of binaries says.
    """

    num_stages: int
    registers: int = 0

    @property
    def options(self) -> dict[str, Any]:
        limit = {"registers": self.registers} if self.registers else {}
        return {**super().options, "num_stages": self.num_stages, "all_registers": True, **limit}


AnyPipelined = TypeVar("AnyPipelined", bound=Pipelined)


def neighbours(tile: AnyPipelined, target: Target, most_stages: int) -> Iterator[AnyPipelined]:
    """The same tile with a step more or less under way, and with registers for one block more or less: for tuning."""
    held: Any = tile
    for stages in (tile.num_stages - 1, tile.num_stages + 1):
        if 1 <= stages <= most_stages:
            yield replace(held, num_stages=stages)
    if target.backend == "cuda":
        for blocks in range(1, WARPS_OF_ALL_REGISTERS // tile.num_warps + 2):
            limit = registers_for(blocks, tile.num_warps)
            if limit < MOST_REGISTERS:  # or else it is none
                yield replace(held, registers=limit)


class InParts:
    """A tile that goes ``block_pixels`` at a time through one of ``parts`` of the pixels."""

    block_pixels: int
    parts: int

    def per_part(self, pixels: int) -> int:
        """Pixels of a part, a multiple of ``block_pixels``."""
        return self._multiple(pixels, self.parts)

    def steps(self, pixels: int) -> int:
        """Through a part."""
        return self.per_part(pixels) // self.block_pixels

    def whole_waves(self, pixels: int, pieces: int, wave: int, most: int, part: float) -> int:
        """Into how many parts the pixels are cut so that all programs are done soonest.

        Args:
            pixels: of all parts.
            pieces: programs that share a part.
            wave: programs that run at once.
            most: parts.
            part: what it takes to write and add one of them, in units of what all programs take in whole waves.
        """
        steps = -(-pixels // self.block_pixels)

        def taken(parts: int) -> float:
            waves, steps_of_part = -(-parts * pieces // wave), self._multiple(pixels, parts) // self.block_pixels
            return waves * (steps_of_part + OUTSIDE) * wave / (pieces * max(1, steps)) + parts * part

        return min({self.filled_parts(pixels, wanted) for wanted in range(1, max(1, most) + 1)}, key=taken)

    def filled_parts(self, pixels: int, wanted: int) -> int:
        """Into how many parts, at most ``wanted``, the pixels are cut so that none is empty."""
        return -(-pixels // self._multiple(pixels, wanted))

    def _multiple(self, pixels: int, parts: int) -> int:
        return max(1, -(-pixels // parts // self.block_pixels)) * self.block_pixels


def most_parts(conv: ConvVariant) -> int:
    """Of a weight's gradient, fp32: together no larger than the smaller of its operands, one of which plain PyTorch has
    in memory where it is formed on load here, so that a step's peak of memory is not above plain's."""
    return max(1, conv.pixels * conv.itemsize // (4 * max(conv.c, conv.k) * conv.taps))


def depthwise(conv: ConvVariant) -> bool:
    """Whether a group has too few channels for tensor cores to gain by packing groups side by side."""
    return conv.groups > 1 and conv.c * conv.k < 4


def power_above(number: int) -> int:
    """The smallest power of two that is not below ``number``."""
    return 1 << max(0, number - 1).bit_length()


def halves(widest: int, narrowest: int = NARROWEST) -> Iterator[int]:
    """``widest``, half of it, and so on while that is not below ``narrowest``."""
    while widest >= narrowest:
        yield widest
        widest //= 2


def other_parts(tile: AnyPipelined) -> Iterator[AnyPipelined]:
    """The same tile, which has parts, with fewer or more of them: for tuning."""
    held: Any = tile
    for parts in (held.parts // 2, 3 * held.parts // 4, 2 * held.parts):
        if parts:
            yield replace(held, parts=parts)


def narrow_waves(target: Target) -> bool:
    """Whether a wave has 32 threads on AMD: half as many share a tile, and their registers spill sooner."""
    return target.backend == "hip" and target.warp_size == 32


def tensor_memory(target: Target) -> bool:
    """Whether accumulators have a memory of their own, as those of sm_100 do."""
    return target.backend == "cuda" and isinstance(target.arch, int) and 100 <= target.arch < 120


def wide(target: Target) -> bool:
    """Whether tensor cores read their operands from shared memory, as those of sm_90 and sm_100 do."""
    return target.backend == "cuda" and isinstance(target.arch, int) and 90 <= target.arch < 120
