"""Rows of pixels that need not lie one after the other: a slice of a wider tensor's channels."""

import triton
import triton.language as tl


@triton.jit
def row_of(
    given,  # elements from one pixel of a tensor to the next, or None: its pixels lie one after the other
    channels,
    MULTIPLE: tl.constexpr,  # a power of two that divides both
):
    """The same with the promise that the compiler needs for wide accesses."""
    row = channels if given is None else given // MULTIPLE * MULTIPLE
    return row


@triton.jit
def load_in_fours(
    ptr,  # (rows, C) fp32
    o_row,  # (ROWS,) which of them
    first_c,  # the tile's first channel
    C,
    m_row,  # (ROWS,) which exist
    last_c,  # channels from here on are outside
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """(ROWS, COLUMNS), 16 bytes to a thread also beside tiles of 16-bit values.

    The compiler gives loads of one shape that meet the layout of the one with most values to a thread, in which fp32
    values would be read in every other piece of 16 bytes. So this one has a shape of its own.
    """
    o_c = first_c + tl.arange(0, COLUMNS // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    m = m_row[:, None, None] & (o_c < last_c)[None, :, :]
    # As in `along_columns`, of the fours.
    ptrs = tl.max_contiguous(ptr + o_row[:, None, None] * C + o_c[None, :, :], [1, 2, 4])
    return tl.reshape(tl.load(ptrs, mask=m, other=0.0), (ROWS, COLUMNS))


@triton.jit
def along_columns(
    ptrs,  # (ROWS, COLUMNS) or fewer dimensions
    o,  # (ROWS, COLUMNS)
    RUN: tl.constexpr,  # columns that are known to lie one after the other; 1: none
):
    """``ptrs + o``, of which neighbouring threads are to take neighbouring columns."""
    # Where it sees no run the compiler of Triton 3.6 lays threads along the rows, a sector for every value, and that
    # of 3.8 along the columns. A pair decides it for both. None is read at once: that takes an alignment of two too,
    # which columns without a run do not have.
    PAIR: tl.constexpr = RUN if RUN > 2 else 2
    return tl.max_contiguous(ptrs + o, [1, PAIR])
