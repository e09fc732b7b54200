"""Batch norm and a PReLU behind it, forward and backward, over a convolution's output that was written to memory.

The PReLU's slopes are parameters, whose gradient is made beside batch norm's sums. Nothing is kept for the backward
pass but y: the sign of the PReLU's input is told from y again.
"""

import triton
import triton.language as tl

from fusedres.kernels.forming import formed_gradient, of_channels


@triton.jit
def slopes_of(
    slope_ptr,  # (C,) or (1,), any dtype
    o_c,
    m_c,
    EACH: tl.constexpr,  # whether every channel has its own
):
    """(1, BLOCK_C) fp32."""
    return tl.load(slope_ptr + (o_c if EACH else o_c * 0), mask=m_c, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["rows"])
def bn_prelu_kernel(
    y_ptr,  # (rows, C) raw convolution output, storage dtype
    scale_ptr,  # (C,) fp32, gamma * invstd
    shift_ptr,  # (C,) fp32, beta - mean * scale
    slope_ptr,  # as in `slopes_of`
    z_ptr,  # (rows, C) out
    rows,
    C,
    EACH: tl.constexpr,
    C_MULTIPLE: tl.constexpr,  # a power of two that divides C
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = C // C_MULTIPLE * C_MULTIPLE
    pieces = tl.cdiv(C, BLOCK_C)
    i_row, i_c = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    # rows * C can pass 2**31, so a tile's first row has a 64-bit offset.
    first = i_row.to(tl.int64) * BLOCK_ROWS
    o_row = tl.arange(0, BLOCK_ROWS)
    m_c = o_c < C
    m = (o_row < rows - first)[:, None] & m_c[None, :]
    o = first * C + o_row[:, None] * C + o_c[None, :]

    v = tl.load(y_ptr + o, mask=m, other=0.0).to(tl.float32)
    v = v * of_channels(scale_ptr, o_c, m_c, False) + of_channels(shift_ptr, o_c, m_c, False)
    z = tl.where(v > 0, v, v * slopes_of(slope_ptr, o_c, m_c, EACH))
    tl.store(z_ptr + o, z.to(z_ptr.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["rows", "rows_per_part"])
def bn_prelu_reduce_kernel(
    g_ptr,  # (rows, C) gradient at the PReLU's output, storage dtype
    y_ptr,  # (rows, C) raw convolution output
    scale_ptr,  # (C,) fp32
    shift_ptr,  # (C,) fp32
    slope_ptr,  # as in `slopes_of`
    mean_ptr,  # (C,) fp32
    part_g_ptr,  # (parts, C) fp32 out, sum(h), of the gradient h at the PReLU's input
    part_gd_ptr,  # (parts, C) fp32 out, sum(h * (y - mean))
    part_slope_ptr,  # (parts, C) fp32 out, sum(g * min(v, 0)), of the PReLU's input v
    rows,
    C,
    rows_per_part,  # a multiple of BLOCK_ROWS
    EACH: tl.constexpr,
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

    scale, shift = of_channels(scale_ptr, o_c, m_c, False), of_channels(shift_ptr, o_c, m_c, False)
    mean, slope = of_channels(mean_ptr, o_c, m_c, False), slopes_of(slope_ptr, o_c, m_c, EACH)
    sum_g = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    sum_gd = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    sum_slope = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for start in range(0, count, BLOCK_ROWS):
        m = (o_row < count - start)[:, None] & m_c[None, :]
        # g is zero outside the tensor.
        g = tl.load(g_ptr + (first + start) * C + o, mask=m, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + (first + start) * C + o, mask=m, other=0.0).to(tl.float32)
        v = y * scale + shift
        h = tl.where(v > 0, g, g * slope)
        sum_g += h
        sum_gd += h * (y - mean)
        sum_slope += tl.where(v > 0, 0.0, g * v)
    o_out = i_part * C + o_c
    tl.store(part_g_ptr + o_out, tl.sum(sum_g, axis=0), mask=m_c)
    tl.store(part_gd_ptr + o_out, tl.sum(sum_gd, axis=0), mask=m_c)
    tl.store(part_slope_ptr + o_out, tl.sum(sum_slope, axis=0), mask=m_c)


@triton.jit(do_not_specialize=["rows"])
def bn_prelu_apply_kernel(
    g_ptr,  # (rows, C) gradient at the PReLU's output
    y_ptr,  # (rows, C) raw convolution output
    scale_ptr,  # (C,) fp32
    shift_ptr,  # (C,) fp32
    slope_ptr,  # as in `slopes_of`
    q_ptr,  # (C,) fp32, or None
    r_ptr,  # (C,) fp32; None together with q, as the mean
    mean_ptr,  # (C,) fp32
    dy_ptr,  # (rows, C) out: scale * h + q * (y - mean) + r, of the gradient h at the PReLU's input
    rows,
    C,
    EACH: tl.constexpr,
    C_MULTIPLE: tl.constexpr,  # a power of two that divides C
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = C // C_MULTIPLE * C_MULTIPLE
    pieces = tl.cdiv(C, BLOCK_C)
    i_row, i_c = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    first = i_row.to(tl.int64) * BLOCK_ROWS
    o_row = tl.arange(0, BLOCK_ROWS)
    m_c = o_c < C
    m = (o_row < rows - first)[:, None] & m_c[None, :]
    o = first * C + o_row[:, None] * C + o_c[None, :]

    g = tl.load(g_ptr + o, mask=m, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + o, mask=m, other=0.0).to(tl.float32)
    scale, q, r, mean = of_channels(scale_ptr, o_c, m_c, False), None, None, None
    v = y * scale + of_channels(shift_ptr, o_c, m_c, False)
    h = tl.where(v > 0, g, g * slopes_of(slope_ptr, o_c, m_c, EACH))
    if q_ptr is not None:
        q, r = of_channels(q_ptr, o_c, m_c, False), of_channels(r_ptr, o_c, m_c, False)
        mean = of_channels(mean_ptr, o_c, m_c, False)
    dy = formed_gradient(h, y, scale, q, r, mean, None)
    tl.store(dy_ptr + o, dy.to(dy_ptr.dtype.element_ty), mask=m)
