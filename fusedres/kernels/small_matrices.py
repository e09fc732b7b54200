"""Products and tiles of matrices as large as a weight or the square of its channels.

A weight of 16 bits is exact on tensor cores, and a matrix of fp32 that it meets is taken in as many terms as hold its
digits.
"""

import triton
import triton.language as tl


@triton.jit
def _in_tf32(x):
    """Rounded to the ten digits that tensor cores look at."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def fp32_dot(
    w,  # weights, storage dtype
    x,  # fp32
    acc,  # fp32
    PRECISION: tl.constexpr,  # "bf16x3", "tf32x2": the terms of x, for weights of 16 bits; or one of `tl.dot`
):
    """acc + w x with fp32's digits."""
    if PRECISION == "bf16x3":
        for _ in tl.static_range(3):
            term = x.to(tl.bfloat16)
            acc = tl.dot(w, term, acc)
            x -= term.to(tl.float32)
    elif PRECISION == "tf32x2":
        high = _in_tf32(x)
        acc = tl.dot(w.to(tl.float32), high, acc, input_precision="tf32")
        acc = tl.dot(w.to(tl.float32), _in_tf32(x - high), acc, input_precision="tf32")
    else:
        acc = tl.dot(w.to(tl.float32), x, acc, input_precision=PRECISION)
    return acc


@triton.jit
def pair_of(i_pair, pieces):
    """Row and column, column >= row, of the i-th tile on or above the diagonal."""
    row = 0
    while i_pair >= pieces - row:
        i_pair -= pieces - row
        row += 1
    return row, row + i_pair
