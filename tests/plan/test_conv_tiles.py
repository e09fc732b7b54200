"""fusedres.plan.conv_tiles: into how many parts the pixels of a weight gradient are cut."""

import pytest

from fusedres.offline import TARGETS
from fusedres.plan.conv_tiles import ENOUGH_TILES, FILLING, ConvShape, weight_grad_tiles


def parts_of(shape: ConvShape) -> tuple[int, int, float]:
    """Parts, programs, and the bytes of the parts, there and back, in units of what the contraction reads."""
    tile = weight_grad_tiles(shape, TARGETS["sm_90"])[0]
    read = shape.pixels * (shape.operands * shape.k + shape.c) * shape.itemsize
    moved = 2 * 4 * tile.parts * shape.k * shape.r * shape.s * shape.c
    return tile.parts, tile.parts * tile.tiles(shape), moved / read


# The last stages of ResNet-56 and of a pre-activation ResNet-164, and the first one of ResNet-50, batch 256.
CASES = {
    "64 x 64, 3x3, 8 x 8 pixels": ConvShape(256 * 64, 64, 64, 1, 3, 3, 2, operands=2),
    "64 -> 256, 8 x 8 pixels": ConvShape(256 * 64, 64, 256, 1, 1, 1, 2),
    "256 -> 64, 8 x 8 pixels": ConvShape(256 * 64, 256, 64, 1, 1, 1, 2, operands=2),
    "16 x 16, 3x3, 32 x 32 pixels": ConvShape(256 * 1024, 16, 16, 1, 3, 3, 2, operands=2),
    "64 x 64, 3x3, 56 x 56 pixels": ConvShape(256 * 3136, 64, 64, 1, 3, 3, 2, operands=2),
}


@pytest.mark.parametrize("case", CASES)
def test_parts_fill_the_gpu_and_are_small_beside_the_operands(case):
    parts, programs, share = parts_of(CASES[case])
    assert parts > 1
    assert FILLING * 0.8 <= programs <= ENOUGH_TILES
    assert share <= 0.5 or programs <= FILLING


def test_where_the_activations_are_large_there_are_as_many_programs_as_two_a_multiprocessor():
    parts, programs, share = parts_of(CASES["16 x 16, 3x3, 32 x 32 pixels"])
    assert (parts, programs) == (28, 252)
    assert share < 0.03
