"""How often dy is formed for both gradients of a convolution: pure functions of shape, dtype and target.

By each of two launches as it needs it; by one launch for both, whose tile is here; or once, in a pass before two that
read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from fusedres.compiler.targets import Target
from fusedres.plan.conv_tiles import MOST_STAGES, MOST_WAVES
from fusedres.plan.decisions import TILE, taken
from fusedres.plan.gpus import target_gpu
from fusedres.plan.shapes import (
    NARROWEST,
    OUTSIDE,
    ConvVariant,
    InParts,
    Pipelined,
    most_parts,
    neighbours,
    other_parts,
    power_above,
    site_of,
    tensor_memory,
    wide,
)

# A program keeps its sums of the weight's gradient, one for each tap, in the registers of eight warps.
MOST_SUMS = 1 << 14
# Of the FLOP/s of long products, what these reach: dy passes through registers and shared memory on its way to both.
# By the instructions of one step; for a target whose tensor cores are half as fast these hold up half as much.
ONE_LAUNCH_REACHED, TWO_LAUNCHES_REACHED = {True: 1 / 3, False: 1 / 5}, {True: 1 / 2, False: 1 / 4}
FAST_MATRIX_TFLOPS = 500
# Instructions for each tensor that a value of dy is formed of, at every tap of a window and for so many channels of the
# input at once; and the share of a product's time that the others of its loop take to issue, on a GPU of fast tensor
# cores. Of compiled loops.
FORM_INSTRUCTIONS, FORMED_FOR, OTHERS = 4, 128, 0.75
# What a launch that is not made spares, where Python starts them one by one.
LAUNCH_SECONDS = 10e-6


@dataclass(frozen=True)
class BackwardTile(InParts, Pipelined):
    """``block_pixels`` at a time of one of ``parts`` of the pixels, ``block_c`` input channels, all output channels.

    ``block_k`` is the power of two that holds the output's channels.
    """

    block_pixels: int
    block_k: int
    block_c: int
    num_warps: int
    num_stages: int
    parts: int
    registers: int = 0

    def pieces(self, conv: ConvVariant) -> int:
        """Tiles side by side that cover the input's channels."""
        return -(-conv.c // self.block_c)


def backward_tile(
    conv: ConvVariant, target: Target, *, bits: bool = False, weighed: bool = True
) -> BackwardTile | None:
    """The tile of `conv_backward` for a convolution of stride 1; None where two launches are faster or nothing fits.

    Args:
        conv: ``operands`` is how many tensors dy is formed of; ``prologue``, whether a producer's sums are wanted.
        target: that it runs on.
        bits: whether bit masks are unpacked in registers: dy's, or that of what is added beside a producer's sums or as
            a pooled gradient.
        weighed: whether `one_pass_pays` is asked; else it is for whoever asks to say.
    """
    # AMD's compilers keep the masks of unrolled taps in scalar registers, and spill hundreds.
    if target.backend != "cuda" or conv.itemsize != 2 or conv.groups > 1 or conv.pixels == 0:
        return None
    taps, block_k = conv.taps, max(NARROWEST, power_above(conv.k))
    # Where both operands of a product come from registers, half as many sums leave room for them.
    widest = NARROWEST if taps > 1 else 128 if wide(target) else 32 if conv.prologue else 64
    block_c = max(NARROWEST, min(power_above(conv.c), widest, MOST_SUMS // (taps * block_k)))
    sums = taps * block_k * block_c
    # Compilers from sm_100 on have no registers for the bits of nine taps, and that for sm_100 for half of the sums.
    too_many = taps > 1 and ((bits and int(target.arch) >= 100) or (tensor_memory(target) and sums > MOST_SUMS // 2))
    if too_many or sums > MOST_SUMS or block_k > 256:
        return None
    if weighed and not one_pass_pays(conv, target, -(-conv.c // block_c)):
        return None
    # The taps of a window are unrolled, and their operands together exceed shared memory's room for two steps.
    short = taps > 1 or bits or block_k > (64 if target.arch == 120 else 128)
    tile = BackwardTile(16 if short else 32, block_k, block_c, 8, 2 if taps == 1 else 1, 1)
    # Eight warps of a tile have a multiprocessor for themselves.
    part = 2 * 4 * taps * conv.c * conv.k / target_gpu(target).bandwidth / max(_one_launch(conv, target), 1e-9)
    pieces, wave = tile.pieces(conv), target.multiprocessors
    moved = conv.pixels * (conv.operands * conv.k + 2 * conv.c) * conv.itemsize
    most = min(
        -(-conv.pixels // (OUTSIDE * tile.block_pixels)),
        -(-MOST_WAVES * wave // pieces),
        moved // (16 * taps * conv.c * conv.k),  # written and read, half of what the operands take
        most_parts(conv),
    )
    own = replace(tile, parts=tile.whole_waves(conv.pixels, pieces, wave, most, part))

    def more() -> Iterator[BackwardTile]:
        yield from neighbours(own, target, MOST_STAGES)
        yield from other_parts(own)

    decided = taken(TILE, lambda: site_of(f"both gradients{' bits' * bits}", conv), conv.pixels, [own], more)
    return replace(decided, parts=decided.filled_parts(conv.pixels, min(decided.parts, most_parts(conv))))


def one_pass_pays(conv: ConvVariant, target: Target, pieces: int) -> bool:
    """Whether one launch takes no longer than two, as far as bytes, FLOPs and the forming of dy tell.

    Args:
        conv: as in `backward_tile`.
        target: that it runs on.
        pieces: of the input's channels, for each of which the one launch forms dy again.
    """
    gpu, pointwise = target_gpu(target), conv.taps == 1
    dy, x = conv.operands * conv.k * conv.itemsize, conv.c * conv.itemsize
    product = _product(conv, target) / TWO_LAUNCHES_REACHED[pointwise]
    two_launches = 2 * conv.pixels * max((dy + x) / gpu.bandwidth, product)
    return _one_launch(conv, target, pieces) - two_launches <= LAUNCH_SECONDS


def _product(conv: ConvVariant, target: Target) -> float:
    """Seconds of a pixel's share in one of the two products."""
    gpu = target_gpu(target)
    rate = gpu.rate(torch.bfloat16) * (1 if gpu.matrix_tflops > FAST_MATRIX_TFLOPS else 2)
    return 2 * conv.taps * conv.c * conv.k / rate


def _one_launch(conv: ConvVariant, target: Target, pieces: int = 1) -> float:
    """Seconds of one launch for both gradients."""
    gpu = target_gpu(target)
    moving = (conv.operands * conv.k + 2 * conv.c) * conv.itemsize / gpu.bandwidth
    # Of what two launches form too the share of the products' rate tells.
    more = max(0, pieces - 2 * -(-conv.c // FORMED_FOR))
    forming = FORM_INSTRUCTIONS * conv.operands * conv.k * conv.taps * more / (gpu.fp32_tflops * 1e12 / 2)
    return conv.pixels * max(moving, 2 * _product(conv, target) / ONE_LAUNCH_REACHED[conv.taps == 1] + forming)


def writing_pays(conv: ConvVariant, target: Target) -> bool:
    """Whether dy is written once for both gradients of a window, which would form it again at each of its taps.

    Args:
        conv: ``operands`` is how many tensors dy is formed of.
        target: that it runs on.
    """
    taps = conv.taps
    # The figures above are of 16 bits; those of fp32 have not been read.
    if taps == 1 or conv.operands == 1 or conv.itemsize != 2:
        return False
    gpu = target_gpu(target)
    # Of a pixel.
    product = 2 * taps * conv.c * conv.k * conv.groups / gpu.rate(torch.bfloat16)
    forms = conv.k * conv.groups * taps * -(-conv.c // FORMED_FOR)
    forming = FORM_INSTRUCTIONS * conv.operands * forms / (gpu.fp32_tflops * 1e12 / 2)
    writing = (conv.operands + 1) * conv.k * conv.groups * conv.itemsize / gpu.bandwidth
    spared = 2 * (max(product, OTHERS * product + forming) - product)
    return conv.pixels * (spared - writing) > LAUNCH_SECONDS
