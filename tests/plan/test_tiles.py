"""fusedres.plan.tiles: how tensors are cut, and pinning a choice."""

import pytest
import torch

from fusedres.compiler.targets import TARGETS
from fusedres.plan.tiles import (
    PROGRAMS,
    RowTile,
    alignment,
    gram_tile,
    matrix_tile,
    moments_tile,
    pinned,
    reduction_tile,
    reduction_tiles,
    row_tile,
    row_tiles,
    weight_precision,
    weight_rows_tile,
)

SHAPES = [(1, 1), (7, 3), (49, 2048), (392, 64), (1000, 96), (12544, 1000), (802816, 64), (3211264, 64), (98, 5000)]


@pytest.mark.parametrize(("rows", "channels"), SHAPES)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_are_powers_of_two_that_cover_the_tensor(rows, channels, itemsize):
    for tile in (*row_tiles(rows, channels, itemsize), *reduction_tiles(rows, channels)):
        for side in (tile.block_rows, tile.block_c, tile.num_warps):
            assert side > 0 and side & (side - 1) == 0
        assert tile.block_c % 8 == 0, "a byte of the mask holds eight channels"
        assert tile.pieces(channels) * tile.block_c >= channels
        blocks_of_rows = tile.blocks(rows, channels) // tile.pieces(channels)
        assert (blocks_of_rows - 1) * tile.block_rows < rows <= blocks_of_rows * tile.block_rows


@pytest.mark.parametrize(("rows", "channels"), SHAPES)
def test_parts_of_a_reduction_cover_the_rows_once(rows, channels):
    for tile in reduction_tiles(rows, channels):
        parts, per_part = tile.parts(rows, channels)
        assert per_part % tile.block_rows == 0
        assert (parts - 1) * per_part < rows <= parts * per_part
        assert parts == 1 or parts * tile.pieces(channels) <= PROGRAMS


def test_no_rows_make_one_empty_part():
    tile = reduction_tiles(0, 64)[0]
    assert tile.parts(0, 64)[0] == 1
    assert row_tiles(0, 64, 2)[0].blocks(0, 64) == 0


def test_the_default_fills_a_large_gpu():
    """First stage of ResNet-50 at batch 256: more programs than 132 multiprocessors hold at a time."""
    assert row_tile(802816, 64, 2).blocks(802816, 64) == 12544
    assert reduction_tile(802816, 64).parts(802816, 64) == (512, 1568)


def test_channels_that_no_piece_divides_lie_in_one_tile():
    assert [row_tiles(1000, channels, 2)[0].block_c for channels in (1, 24, 64, 96, 192, 256, 1000)] == [
        8, 32, 64, 128, 64, 128, 1024,
    ]  # fmt: skip


def test_alignment_is_a_power_of_two_that_divides():
    assert [alignment(channels) for channels in (1, 6, 12, 40, 48, 64)] == [1, 2, 4, 8, 16, 16]


def test_a_pinned_tile_is_what_runs_until_the_end_of_the_block():
    tile = RowTile(4, 8, 2)
    with pinned(tile):
        assert row_tile(100, 64, 2) is tile
        assert reduction_tile(100, 64) is tile
    assert row_tile(100, 64, 2) == row_tiles(100, 64, 2)[0]
    assert reduction_tile(100, 64) == reduction_tiles(100, 64)[0]


@pytest.mark.parametrize("channels", [1, 17, 64, 96, 256, 512, 1024, 2048])
@pytest.mark.parametrize("parts", [1, 7, 256])
@pytest.mark.parametrize("outputs", [1, 40, 256, 2048])
def test_tiles_of_small_matrices_cover_them(channels, parts, outputs):
    for target in (TARGETS["sm_90"], TARGETS["gfx1100"]):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            gram, precision = moments_tile(50176, channels, dtype.itemsize, target), weight_precision(target, dtype)
            tile = gram_tile(gram.pairs(channels), gram.block_c, parts, outputs, precision)
            assert gram.block_c % tile.block_c == 0 and tile.block_c >= 16
            assert tile.k_pieces * tile.steps(outputs) * tile.block_k >= outputs
            assert tile.block_parts * tile.block_c**2 <= max(4096, tile.block_c**2)
            rows = weight_rows_tile(parts, outputs, channels)
            assert rows.block_c >= channels and rows.block_k * rows.block_c <= max(1024, rows.block_c)


def test_small_matrices_of_wide_layers_fill_a_gpu():
    """Those of ResNet-50's last block end: several programs for each multiprocessor, where rows of tiles were 64."""
    target = TARGETS["sm_90"]
    gram, tile = moments_tile(12544, 512, 2, target), matrix_tile(target, torch.bfloat16)
    cut = gram_tile(gram.pairs(512), gram.block_c, gram.parts, 2048, tile.precision)
    programs = gram.pairs(512) * (gram.block_c // cut.block_c) ** 2 * cut.k_pieces
    assert programs >= 2 * target.multiprocessors
    assert 2048 // tile.block_k * 512 // tile.block_c >= target.multiprocessors
    assert 2048 // weight_rows_tile(4, 2048, 512).block_k >= 2 * target.multiprocessors
