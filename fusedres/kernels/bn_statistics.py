"""Mean and squared deviations of a tensor in memory, per channel and part of the rows."""

import triton
import triton.language as tl

from fusedres.kernels.main_loop import in_columns


@triton.jit
def store_tile_statistics(
    y,  # (BLOCK_ROWS, BLOCK_C) tile as stored, storage dtype
    m_row,  # (BLOCK_ROWS,) rows inside the tensor
    m_c,  # (BLOCK_C,) channels inside the tensor
    count,  # how many of them, int32
    i_part,  # this tile's place among the parts
    o_c,  # (BLOCK_C,) channels
    C,
    count_ptr,  # (parts,) fp32 out; written where is_first
    mean_ptr,  # (parts, C) fp32 out
    m2_ptr,  # (parts, C) fp32 out
    is_first,  # whether this is the first tile along the channels
):
    """Mean and squared deviations of one tile, in two passes over registers."""
    y = in_columns(y).to(tl.float32)
    # The last tile alone has rows to leave out, and the others branch around that.
    whole = count == y.shape[0]
    if not whole:
        y = tl.where(m_row[:, None], y, 0.0)
    count = count.to(tl.float32)
    mean = tl.sum(y, axis=0) * (1 / count)
    d = y - mean[None, :]
    if not whole:
        d = tl.where(m_row[:, None], d, 0.0)
    o = i_part.to(tl.int64) * C + o_c
    tl.store(mean_ptr + o, mean, mask=m_c)
    tl.store(m2_ptr + o, tl.sum(d * d, axis=0), mask=m_c)
    if is_first:
        tl.store(count_ptr + i_part, count)


@triton.jit(do_not_specialize=["rows", "rows_per_part"])
def bn_statistics_kernel(
    y_ptr,  # (rows, C) storage dtype
    count_ptr,  # (parts,) fp32 out, rows of each part
    mean_ptr,  # (parts, C) fp32 out
    m2_ptr,  # (parts, C) fp32 out, sum of (y - mean)^2
    rows,
    C,
    rows_per_part,  # a multiple of BLOCK_ROWS
    C_MULTIPLE: tl.constexpr,  # a power of two that divides C
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = C // C_MULTIPLE * C_MULTIPLE
    pieces = tl.cdiv(C, BLOCK_C)
    i_part, i_c = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_row = tl.arange(0, BLOCK_ROWS)
    o = o_row[:, None] * C + o_c[None, :]
    first = i_part.to(tl.int64) * rows_per_part
    count = tl.minimum(rows_per_part, rows - first).to(tl.int32)
    y_ptr += first * C

    # Deviations from the mean of the first tile: sums of y^2 itself cancel where the mean is large.
    m_row = o_row < count
    y = tl.load(y_ptr + o, mask=m_row[:, None] & m_c[None, :], other=0.0).to(tl.float32)
    shift = tl.sum(y, axis=0) / tl.minimum(count, BLOCK_ROWS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for start in range(0, count, BLOCK_ROWS):
        m = (o_row < count - start)[:, None] & m_c[None, :]
        y = tl.load(y_ptr + start.to(tl.int64) * C + o, mask=m, other=0.0).to(tl.float32)
        d = tl.where(m, y - shift[None, :], 0.0)
        total += d
        squares += d * d
    total = tl.sum(total, axis=0)
    squares = tl.sum(squares, axis=0)
    o_out = i_part * C + o_c
    tl.store(mean_ptr + o_out, shift + total / count, mask=m_c)
    # Rounding can leave a sum of squares of equal numbers below zero; a NaN stays one.
    m2 = tl.maximum(squares - total * total / count, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(m2_ptr + o_out, m2, mask=m_c)
    if i_c == 0:
        tl.store(count_ptr + i_part, count.to(tl.float32))
