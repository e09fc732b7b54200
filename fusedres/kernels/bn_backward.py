"""The backward pass of batch norm: two sums per channel, what follows from them, and the gradient at its input."""

import triton
import triton.language as tl

from fusedres.kernels.act_mask import load_masked
from fusedres.kernels.forming import formed_gradient, of_channels
from fusedres.kernels.parts import add_parts, columns_of_parts
from fusedres.kernels.rows import row_of
from fusedres.kernels.zero_pad_shortcut import load_zero_padded_grad


@triton.jit(do_not_specialize=["rows", "rows_per_part", "image"])
def bn_backward_reduce_kernel(
    g_ptr,  # (rows, C) gradient behind the normalisation, storage dtype; (rows // image, C)
    mask_ptr,  # as in `load_masked`, or None
    y_ptr,  # (rows, C) raw convolution output
    mean_ptr,  # (C,) fp32
    part_g_ptr,  # (parts, C) fp32 out, sum(g)
    part_gd_ptr,  # (parts, C) fp32 out, sum(g * (y - mean))
    rows,
    image,  # as in `load_masked`
    C,
    rows_per_part,  # a multiple of BLOCK_ROWS
    ACT: tl.constexpr,  # that the mask is of, or None
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

    mean = tl.load(mean_ptr + o_c, mask=m_c, other=0.0)
    sum_g = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    sum_gd = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for start in range(0, count, BLOCK_ROWS):
        m_row = o_row < count - start
        g = load_masked(
            g_ptr, mask_ptr, first + start, i_c * BLOCK_C, m_row, image, rows, C, C, ACT, False, BLOCK_ROWS, BLOCK_C
        )
        m = m_row[:, None] & m_c[None, :]
        y = tl.load(y_ptr + (first + start) * C + o, mask=m, other=0.0).to(tl.float32)
        sum_g += g
        # g is zero outside the tensor.
        sum_gd += g * (y - mean[None, :])
    o_out = i_part * C + o_c
    tl.store(part_g_ptr + o_out, tl.sum(sum_g, axis=0), mask=m_c)
    tl.store(part_gd_ptr + o_out, tl.sum(sum_gd, axis=0), mask=m_c)


@triton.jit(do_not_specialize=["parts", "rows", "weight_parts"])
def bn_backward_finish_kernel(
    part_g_ptr,  # (parts, C) fp32
    part_gd_ptr,  # (parts, C) fp32
    invstd_ptr,  # (C,) fp32
    scale_ptr,  # (C,) fp32, gamma * invstd
    part_weight_ptr,  # (weight_parts, weight_size) of a weight's gradient that was made beside them, or None
    sum_g_ptr,  # (C,) fp32 out, the gradient of beta
    sum_gy_ptr,  # (C,) fp32 out, sum(g * y_hat), the gradient of gamma
    q_ptr,  # (C,) fp32 out, -scale * invstd * sum_gy / rows
    r_ptr,  # (C,) fp32 out, -scale * sum_g / rows
    weight_ptr,  # (weight_size,) fp32 out, or None
    parts,
    rows,
    C,
    weight_parts,
    weight_size,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WEIGHT_PARTS: tl.constexpr,  # as BLOCK_PARTS and BLOCK of `add_parts`
    WEIGHT_BLOCK: tl.constexpr,
):
    columns = tl.cdiv(C, BLOCK_C)
    if tl.program_id(0) < columns:
        o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        invstd = tl.load(invstd_ptr + o_c, mask=m_c, other=0.0)
        factor = -tl.load(scale_ptr + o_c, mask=m_c, other=0.0) / rows
        total_g = columns_of_parts(part_g_ptr, o_c, m_c, parts, C, BLOCK_PARTS, BLOCK_C)
        total_gy = columns_of_parts(part_gd_ptr, o_c, m_c, parts, C, BLOCK_PARTS, BLOCK_C) * invstd
        tl.store(sum_g_ptr + o_c, total_g, mask=m_c)
        tl.store(sum_gy_ptr + o_c, total_gy, mask=m_c)
        tl.store(q_ptr + o_c, factor * invstd * total_gy, mask=m_c)
        tl.store(r_ptr + o_c, factor * total_g, mask=m_c)
    elif part_weight_ptr is not None:
        i_block = tl.program_id(0) - columns
        add_parts(part_weight_ptr, weight_ptr, i_block, weight_parts, weight_size, WEIGHT_PARTS, WEIGHT_BLOCK)


@triton.jit(
    do_not_specialize=[
        "rows", "image", "g_row", "y_row", "H", "W", "add_P", "add_Q", "add_stride_h", "add_stride_w",
    ]
)  # fmt: skip
def bn_backward_apply_kernel(
    g_ptr,  # (rows, C) gradient behind the normalisation; (rows // image, C)
    mask_ptr,  # as in `load_masked`, or None
    y_ptr,  # (rows, C) raw convolution output; None together with q
    p_ptr,  # (C,) fp32
    q_ptr,  # (C,) fp32, or None
    r_ptr,  # (C,) fp32; None together with q
    mean_ptr,  # (C,) fp32, or None: zero
    add_ptr,  # (rows, C) a gradient that joins, or (N, add_P, add_Q, add_C) that of a zero-pad shortcut, or None
    dy_ptr,  # (rows, C) out: p * g + q * (y - mean) + r + add
    rows,
    image,  # as in `load_masked`
    C,
    g_row,  # elements from one row of g to the next, a multiple of C_MULTIPLE; None: C
    y_row,  # the same of y
    H,  # of dy, and what the zero-pad shortcut is told of its output
    W,
    add_C,
    add_P,
    add_Q,
    add_stride_h,
    add_stride_w,
    ADD_FIRST: tl.constexpr,  # as in `load_zero_padded_grad`; None: what joins is of dy's size
    ADD_MULTIPLE: tl.constexpr,  # a power of two that divides add_C
    ACT: tl.constexpr,  # that the mask is of, or None
    C_MULTIPLE: tl.constexpr,  # a power of two that divides C and the rows that are given
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = C // C_MULTIPLE * C_MULTIPLE
    g_row, y_row = row_of(g_row, C, C_MULTIPLE), row_of(y_row, C, C_MULTIPLE)
    pieces = tl.cdiv(C, BLOCK_C)
    i_row, i_c = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    # Where dtypes differ, the widest says how many neighbours a thread gets: one 16-byte access of each operand.
    first_c = tl.multiple_of(i_c * BLOCK_C, 128 // dy_ptr.dtype.element_ty.primitive_bitwidth)
    o_c = first_c + tl.arange(0, BLOCK_C)
    first = i_row.to(tl.int64) * BLOCK_ROWS
    o_row = tl.arange(0, BLOCK_ROWS)
    m_row, m_c = o_row < rows - first, o_c < C
    m = m_row[:, None] & m_c[None, :]
    o = o_row[:, None] * C + o_c[None, :]

    g = load_masked(g_ptr, mask_ptr, first, first_c, m_row, image, rows, C, g_row, ACT, False, BLOCK_ROWS, BLOCK_C)
    p, y, q, r, mean = of_channels(p_ptr, o_c, m_c, False), None, None, None, None
    if q_ptr is not None:
        o_y = o_row[:, None] * y_row + o_c[None, :]
        y = tl.load(y_ptr + first * y_row + o_y, mask=m, other=0.0).to(tl.float32)
        if mean_ptr is not None:
            mean = of_channels(mean_ptr, o_c, m_c, False)
        q, r = of_channels(q_ptr, o_c, m_c, False), of_channels(r_ptr, o_c, m_c, False)
    dy = formed_gradient(g, y, p, q, r, mean, None)
    if add_ptr is not None:
        if ADD_FIRST is None:
            dy += tl.load(add_ptr + first * C + o, mask=m, other=0.0).to(tl.float32)
        else:
            at = first + o_row
            dy += load_zero_padded_grad(
                add_ptr, None, at // (H * W), at // W % H, at % W, m_row, i_c * BLOCK_C, C, 0, add_C, add_P, add_Q,
                add_stride_h, add_stride_w, ADD_FIRST, ADD_MULTIPLE, False, None, BLOCK_ROWS, BLOCK_C,
            )  # fmt: skip
    tl.store(dy_ptr + first * C + o, dy.to(dy_ptr.dtype.element_ty), mask=m)
