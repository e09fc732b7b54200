"""The gradient of a convolution's weight: (K, pixels) @ (pixels, R S C), split over the pixels.

Both operands can be formed on load: the gradient dy of the output from its parts, the input u by its producer's batch
norm and activation. Each part of the pixels has a workspace of its own; a second kernel adds them in a fixed order.
"""

import triton
import triton.language as tl

from fusedres.kernels.act_mask import load_masked
from fusedres.kernels.forming import formed_gradient, formed_input, of_channels, product, widened
from fusedres.kernels.main_loop import SIZES, in_rows
from fusedres.kernels.rows import row_of
from fusedres.kernels.stem_pool import unpooled


@triton.jit(do_not_specialize=[*SIZES, "groups", "pixels_per_part", "image", "pooled_P", "pooled_Q"])
def conv_weight_grad_kernel(
    g_ptr,  # (pixels, groups * K) gradient behind the batch norm, or dy itself where p is None; (pixels // image, ...)
    index_ptr,  # (N, pooled_P, pooled_Q, groups * K) uint8: g is at the output of max-pooling (`unpooled`); or None
    mask_ptr,  # as in `load_masked`, or None
    y_ptr,  # (pixels, groups * K) raw convolution output; None together with q
    p_ptr,  # (groups * K,) fp32 of dy = p * g + q * (y - mean) + r, or None: dy = g
    q_ptr,  # (groups * K,) fp32, or None
    r_ptr,  # (groups * K,) fp32; None together with q
    mean_ptr,  # (groups * K,) fp32, or None: zero
    x_ptr,  # (N, H, W, groups * C) input, storage dtype
    scale_ptr,  # (groups * C,) fp32: u = act(x * scale + shift); None: u = x
    shift_ptr,  # (groups * C,) fp32, or None
    out_ptr,  # (parts, ...) fp32 out: dW (groups * K, R * S * C), (groups * K,) of SUM_DY, (R * S * C,) of SUM_U
    pixels,  # N * P * Q
    pixels_per_part,  # a multiple of BLOCK_PIXELS
    image,  # as in `load_masked`
    groups,
    C,  # input channels of a group
    K,  # output channels of a group
    H,
    W,
    P,
    Q,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    pooled_P,
    pooled_Q,
    x_row,  # elements from one pixel of x to the next, a multiple of C_MULTIPLE; None: groups * C
    R: tl.constexpr,
    S: tl.constexpr,
    POOL_R: tl.constexpr,  # of the pooling, where there is one
    POOL_S: tl.constexpr,
    POOL_STRIDE_H: tl.constexpr,
    POOL_STRIDE_W: tl.constexpr,
    POOL_PAD_H: tl.constexpr,
    POOL_PAD_W: tl.constexpr,
    PADDED: tl.constexpr,  # whether a window can reach beyond the input
    GROUPS_PER_TILE: tl.constexpr,
    SAME: tl.constexpr,  # whether the input has the output's pixels: stride 1, and as many of them
    TURNED: tl.constexpr,  # whether u is the left operand, which nothing is formed of then, and dy the right one
    TAPS: tl.constexpr,  # of the window that a program sums, one after the other; a divisor of R * S
    INPUT_ONCE: tl.constexpr,  # whether its taps share u, at the pixels of a step, and not dy; only where SAME
    EVEN_PIXELS: tl.constexpr,  # whether BLOCK_PIXELS divides the pixels
    EVEN_K: tl.constexpr,  # whether BLOCK_K divides the output channels
    EVEN_C: tl.constexpr,  # whether BLOCK_C divides the columns
    SUM_DY: tl.constexpr,  # whether the sum of dy is wanted too
    SUM_U: tl.constexpr,  # whether the sum of u's windows is wanted too; of a single group
    ROWS_DY: tl.constexpr,  # rows of dy, and of u, that all threads hold together in one access each
    ROWS_U: tl.constexpr,
    ACT: tl.constexpr,  # that the mask is of, or None
    X_ACT: tl.constexpr,  # that forms u, or None
    TF32: tl.constexpr,
    PAIRS: tl.constexpr,  # see `widened`
    APART: tl.constexpr,  # see `in_rows`
    C_MULTIPLE: tl.constexpr,  # powers of two that divide C and x_row, and K
    K_MULTIPLE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Without the raw output, as who asks for sums is, dW is a difference from this product, which keeps fp32's digits.
    TENSOR_CORES: tl.constexpr = "tf32x3" if SUM_DY or SUM_U else "tf32"
    PRECISION: tl.constexpr = TENSOR_CORES if TF32 else "ieee"
    C, K = C // C_MULTIPLE * C_MULTIPLE, K // K_MULTIPLE * K_MULTIPLE
    x_row = row_of(x_row, groups * C, C_MULTIPLE)
    # Columns: pieces of the channels of so many taps.
    width = GROUPS_PER_TILE * C
    pieces = tl.cdiv(width, BLOCK_C)
    columns = R * S // TAPS * pieces
    tiles_k = tl.cdiv(groups * K, BLOCK_K)
    i = tl.program_id(0)
    i_column, i_k, i_part = i % columns, i // columns % tiles_k, i // (columns * tiles_k)
    first_tap, i_c = i_column // pieces * TAPS, i_column % pieces
    o_e = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    i_group = i_k * BLOCK_K // K // GROUPS_PER_TILE * GROUPS_PER_TILE
    o_x = i_group * C + o_e
    m_k = tl.full((BLOCK_K,), True, tl.int1) if EVEN_K else o_k < groups * K
    m_e = tl.full((BLOCK_C,), True, tl.int1) if EVEN_C else o_e < width
    o_pixel = tl.arange(0, BLOCK_PIXELS)
    if not EVEN_C:
        m_e &= o_x < groups * C
    o_g = o_pixel[:, None] * (groups * K) + o_k[None, :]
    o_u = o_pixel[:, None] * x_row + o_x[None, :]
    begin = i_part * pixels_per_part
    # Every coordinate is counted on from step to step: a division would be twenty instructions for each row.
    COUNTED: tl.constexpr = PADDED or not SAME or index_ptr is not None
    if COUNTED:
        o_n, o_p, o_q = (begin + o_pixel) // (P * Q), (begin + o_pixel) // Q % P, (begin + o_pixel) % Q
        step_n, step_p, step_q = BLOCK_PIXELS // (P * Q), BLOCK_PIXELS // Q % P, BLOCK_PIXELS % Q

    MASKED: tl.constexpr = PADDED or not EVEN_PIXELS
    sums = (tl.zeros((BLOCK_C, BLOCK_K) if TURNED else (BLOCK_K, BLOCK_C), tl.float32),) * TAPS
    # Rows of a tile that different threads hold are summed at the end: a step adds what a thread has.
    sums_u = (tl.zeros((ROWS_U, BLOCK_C), tl.float32),) * TAPS
    sum_dy = tl.zeros((ROWS_DY, BLOCK_K), tl.float32)
    for start in range(begin, tl.minimum(begin + pixels_per_part, pixels), BLOCK_PIXELS):
        first = start.to(tl.int64)
        m_row = tl.full((BLOCK_PIXELS,), True, tl.int1) if EVEN_PIXELS else o_pixel < pixels - start
        m_g = m_row[:, None] & m_k[None, :]
        if INPUT_ONCE:
            u = tl.load(x_ptr + first * x_row + o_u, mask=m_row[:, None] & m_e[None, :], other=0.0)
            if scale_ptr is not None:
                scale, shift = of_channels(scale_ptr, o_x, m_e, EVEN_C), of_channels(shift_ptr, o_x, m_e, EVEN_C)
                u = formed_input(u, scale, shift, None if EVEN_PIXELS else m_row, None, X_ACT, PAIRS, False)
        elif index_ptr is not None:
            dy = unpooled(
                g_ptr, index_ptr, o_n, o_p, o_q, m_row, o_k, m_k, groups * K, pooled_P, pooled_Q, POOL_R, POOL_S,
                POOL_STRIDE_H, POOL_STRIDE_W, POOL_PAD_H, POOL_PAD_W, BLOCK_PIXELS, BLOCK_K,
            ).to(g_ptr.dtype.element_ty)  # fmt: skip
        elif p_ptr is None and mask_ptr is None and image is None:
            dy = tl.load(g_ptr + first * (groups * K) + o_g, mask=m_g, other=0.0)
            if SUM_DY:
                # Through registers: a copy that arrives in shared memory for a sum and a product is overwritten by the
                # next, in Triton 3.8, while wgmma, the slower of the two, still reads it.
                dy = tl.where(m_g, dy, 0.0)
        else:
            dy = load_masked(
                g_ptr, mask_ptr, first, i_k * BLOCK_K, m_row, image, pixels, groups * K, groups * K, ACT, PAIRS,
                BLOCK_PIXELS, BLOCK_K,
            )  # fmt: skip
            if p_ptr is not None:
                p_k, y, q_k, r_k, mean = of_channels(p_ptr, o_k, m_k, EVEN_K), None, None, None, None
                if q_ptr is not None:
                    y = widened(tl.load(y_ptr + first * (groups * K) + o_g, mask=m_g, other=0.0), PAIRS)
                    if mean_ptr is not None:
                        mean = of_channels(mean_ptr, o_k, m_k, EVEN_K)
                    q_k, r_k = of_channels(q_ptr, o_k, m_k, EVEN_K), of_channels(r_ptr, o_k, m_k, EVEN_K)
                # Rows beyond the output are not zero with r; u is there.
                dy = formed_gradient(dy, y, p_k, q_k, r_k, mean, None)
            dy = dy.to(g_ptr.dtype.element_ty)
        if SUM_DY:  # noqa: SIM102 (a choice of the compiler's, then one of the program's)
            if i_column == 0:
                sum_dy += tl.sum(tl.reshape(dy.to(tl.float32), (BLOCK_PIXELS // ROWS_DY, ROWS_DY, BLOCK_K)), axis=0)
        summed, summed_u = (), ()
        for i_tap in tl.static_range(TAPS):
            tap_r, tap_s = (first_tap + i_tap) // S, (first_tap + i_tap) % S
            down, right = tap_r * dilation_h - pad_h, tap_s * dilation_w - pad_w
            m_in = m_row
            if INPUT_ONCE:
                # The output's pixels under the tap, which are as many as the input's.
                if PADDED:
                    h, w = o_p - down, o_q - right
                    m_in = m_row & (h >= 0) & (h < P) & (w >= 0) & (w < Q)
                g_ptrs = g_ptr + (first - down * Q - right) * (groups * K) + o_g
                dy = tl.load(g_ptrs, mask=m_in[:, None] & m_k[None, :], other=0.0)
            else:
                if COUNTED:
                    h, w = o_p * stride_h + down, o_q * stride_w + right
                if PADDED:
                    m_in = m_row & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                m = m_in[:, None] & m_e[None, :]
                if SAME:
                    u_ptrs = x_ptr + (first + down * W + right) * x_row + o_u
                else:
                    o_in = (o_n.to(tl.int64) * H + h) * W + w
                    u_ptrs = x_ptr + o_in[:, None] * x_row + o_x[None, :]
                u = tl.load(u_ptrs, mask=m, other=0.0)
                if scale_ptr is not None:
                    scale, shift = of_channels(scale_ptr, o_x, m_e, EVEN_C), of_channels(shift_ptr, o_x, m_e, EVEN_C)
                    u = formed_input(u, scale, shift, m_in if MASKED else None, None, X_ACT, PAIRS, False)
                elif SUM_U:
                    u = tl.where(m, u, 0.0)  # as dy
            sum_u = sums_u[i_tap]
            if SUM_U:  # noqa: SIM102
                if i_k == 0:
                    sum_u += tl.sum(tl.reshape(u.to(tl.float32), (BLOCK_PIXELS // ROWS_U, ROWS_U, BLOCK_C)), axis=0)
            summed_u = summed_u + (sum_u,)  # noqa: RUF005 (the compiler unpacks no tuples)
            if TURNED:
                total = product(tl.trans(u), dy, sums[i_tap], PRECISION)
            else:
                total = product(tl.trans(dy), u, sums[i_tap], PRECISION)
            summed = summed + (total,)  # noqa: RUF005
        sums, sums_u = summed, summed_u
        if COUNTED:
            o_q += step_q
            over = o_q >= Q
            o_q = tl.where(over, o_q - Q, o_q)
            o_p += step_p + over.to(tl.int32)
            over = o_p >= P
            o_p = tl.where(over, o_p - P, o_p)
            o_n += step_n + over.to(tl.int32)

    size = groups * K * (R * S * C)
    whole = size + (groups * K if SUM_DY else 0) + (R * S * C if SUM_U else 0)
    out_ptr += i_part.to(tl.int64) * whole
    if SUM_DY:
        tl.store(out_ptr + size + o_k, tl.sum(sum_dy, axis=0), mask=m_k & (i_column == 0))
    o_dw = o_k.to(tl.int64) * (R * S * C)
    m = m_k[:, None] & m_e[None, :]
    for i_tap in tl.static_range(TAPS):
        o_tap, total = (first_tap + i_tap) * C, sums[i_tap]
        if TURNED:
            total = tl.trans(total)
        if SUM_U:
            o_sum = whole - R * S * C + o_tap + o_e
            tl.store(out_ptr + o_sum, tl.sum(sums_u[i_tap], axis=0), mask=m_e & (i_k == 0))
        if GROUPS_PER_TILE > 1:
            # Only the blocks on the diagonal are gradients of anything.
            in_group = o_e[None, :] - ((o_k // K - i_group) * C)[:, None]
            m_group = m & (in_group >= 0) & (in_group < C)
            tl.store(out_ptr + o_dw[:, None] + (o_tap + in_group), total, mask=m_group)
        else:
            dw = in_rows(total, APART, BLOCK_K, BLOCK_C)
            tl.store(out_ptr + o_dw[:, None] + (o_tap + o_e)[None, :], dw, mask=m)
