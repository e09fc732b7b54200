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
    return tl.reshape(tl.load(ptr + o_row[:, None, None] * C + o_c[None, :, :], mask=m, other=0.0), (ROWS, COLUMNS))
