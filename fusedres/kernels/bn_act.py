"""Normalise, add the shortcut, activate: one pass over a convolution's output that was written to memory.

Every operand is optional but y: without a scale the kernel adds and activates alone.
"""

import triton
import triton.language as tl

from fusedres.kernels.epilogue import normalised, store_activated
from fusedres.kernels.rows import row_of
from fusedres.kernels.zero_pad_shortcut import load_zero_padded


@triton.jit(
    do_not_specialize=[
        "rows", "y_row", "P", "Q", "residual_H", "residual_W", "residual_stride_h", "residual_stride_w",
    ]
)  # fmt: skip
def bn_act_kernel(
    y_ptr,  # (rows, C) raw convolution output, storage dtype
    scale_ptr,  # (C,) fp32, gamma * invstd; None: y is added as it is
    shift_ptr,  # (C,) fp32, beta - mean * scale; None together with the scale
    residual_ptr,  # (rows, C) storage dtype, or (N, residual_H, residual_W, residual_C) zero-padded, or None
    residual_scale_ptr,  # (C,) fp32 where the residual is a raw projection, else None
    residual_shift_ptr,  # (C,) fp32, or None
    z_ptr,  # (rows, C) out
    mask_ptr,  # out, as in `store_activated`, or None
    rows,
    C,
    y_row,  # elements from one row of y to the next, a multiple of C_MULTIPLE; None: C
    P,  # of the output, and what the zero-pad shortcut is told of its input
    Q,
    residual_C,
    residual_H,
    residual_W,
    residual_stride_h,
    residual_stride_w,
    RESIDUAL_FIRST: tl.constexpr,  # as in `load_zero_padded`; None: the residual is of the output's size
    RESIDUAL_MULTIPLE: tl.constexpr,  # a power of two that divides residual_C
    ACT: tl.constexpr,
    C_MULTIPLE: tl.constexpr,  # a power of two that divides C and y_row
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = C // C_MULTIPLE * C_MULTIPLE
    pieces = tl.cdiv(C, BLOCK_C)
    i_row, i_c = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    # Where dtypes differ, the widest says how many neighbours a thread gets: one 16-byte access of each operand.
    o_c = tl.multiple_of(i_c * BLOCK_C, 128 // z_ptr.dtype.element_ty.primitive_bitwidth) + tl.arange(0, BLOCK_C)
    # rows * C can pass 2**31 (stem of a large batch), so a tile's first row has a 64-bit offset.
    first = i_row.to(tl.int64) * BLOCK_ROWS
    o_row = tl.arange(0, BLOCK_ROWS)
    m_row, m_c = o_row < rows - first, o_c < C
    m = m_row[:, None] & m_c[None, :]
    o = o_row[:, None] * C + o_c[None, :]
    y_row = row_of(y_row, C, C_MULTIPLE)
    o_y = o_row[:, None] * y_row + o_c[None, :]

    z = tl.load(y_ptr + first * y_row + o_y, mask=m, other=0.0).to(tl.float32)
    z = normalised(z, scale_ptr, shift_ptr, None, None, None, None, None, 0.0, o_c, m_c)
    if residual_ptr is not None:
        if RESIDUAL_FIRST is None:
            residual = tl.load(residual_ptr + first * C + o, mask=m, other=0.0).to(tl.float32)
        else:
            at = first + o_row
            residual = load_zero_padded(
                residual_ptr, at // (P * Q), at // Q % P, at % Q, m_row, o_c, residual_C, residual_H, residual_W,
                residual_stride_h, residual_stride_w, RESIDUAL_FIRST, RESIDUAL_MULTIPLE,
            )  # fmt: skip
        z += normalised(
            residual, residual_scale_ptr, residual_shift_ptr, None, None, None, None, None, 0.0, o_c, m_c
        )  # fmt: skip
    store_activated(
        z, z_ptr, mask_ptr, first, o_row, o_c, m_row, m_c, i_c * BLOCK_C, C, rows, C, ACT, True, False, BLOCK_ROWS,
        BLOCK_C,
    )  # fmt: skip
