"""Blocks of pixels of few channels become pixels of many, padded with zeros, on the way from any layout and dtype."""

import triton
import triton.language as tl

from fusedres.kernels.rows import along_columns


@triton.jit(do_not_specialize=["x_n", "x_c", "x_h", "x_w", "H", "W", "rows", "length", "pad_h", "pad_w"])
def space_to_depth_kernel(
    x_ptr,  # (N, C, H, W) in any layout
    out_ptr,  # (N, rows, length) out: a row is blocks side by side, each of PITCH elements
    x_n,  # elements from one image, channel, row and column of x to the next
    x_c,
    x_h,
    x_w,
    H,
    W,
    rows,
    length,  # a multiple of 4
    pad_h,
    pad_w,
    C: tl.constexpr,
    BLOCK_H: tl.constexpr,  # pixels of a block
    BLOCK_W: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCKS: tl.constexpr,  # of a tile
    COLUMNS: tl.constexpr,  # not below PITCH
):
    length = length // 4 * 4
    pieces = tl.cdiv(tl.cdiv(length, PITCH), BLOCKS)
    i_row, i_piece = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    n, i_h = i_row // rows, i_row % rows
    o_block, o_c = i_piece * BLOCKS + tl.arange(0, BLOCKS), tl.arange(0, COLUMNS)
    h = i_h * BLOCK_H + o_c // (BLOCK_W * C) - pad_h
    w = (o_block * BLOCK_W - pad_w)[:, None] + (o_c // C % BLOCK_W)[None, :]
    m_c = (o_c < BLOCK_H * BLOCK_W * C) & (h >= 0) & (h < H)
    # An image has fewer than 2**31 elements, a batch may have more.
    o_x = w * x_w + (o_c % C * x_c + h * x_h)[None, :]
    m = m_c[None, :] & (w >= 0) & (w < W)
    x = tl.load(along_columns(x_ptr + n.to(tl.int64) * x_n, o_x, 1), mask=m, other=0.0)
    o = o_block[:, None] * PITCH + o_c[None, :]
    m = (o_c < PITCH)[None, :] & (o < length)
    tl.store(out_ptr + i_row.to(tl.int64) * length + o, x.to(out_ptr.dtype.element_ty), mask=m)
