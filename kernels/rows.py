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
