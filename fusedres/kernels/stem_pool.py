"""The end of the stem: normalise, activate and max-pool without writing the full-size activation, and its way back.

The backward kernel gathers: every pixel asks the windows that hold it, so that no two programs add to one number.
"""

import triton
import triton.language as tl

from fusedres.kernels.activation import activated, opening
from fusedres.kernels.bn_finalize import load_running

NO_GRADIENT = tl.constexpr(255)  # index of a window at whose maximum the activation is not open


@triton.jit(do_not_specialize=["rows", "H", "W", "P", "Q"])
def stem_pool_kernel(
    y_ptr,  # (N, H, W, C) raw convolution output, storage dtype
    scale_ptr,  # (C,) fp32, or None where they are formed from the running statistics
    shift_ptr,  # (C,) fp32, or None
    running_mean_ptr,  # (C,) any dtype, as in `load_running`, or None
    running_var_ptr,  # (C,) any dtype, or None
    gamma_ptr,  # (C,) any dtype, or None
    beta_ptr,  # (C,) any dtype, or None
    bias_ptr,  # (C,) any dtype, or None
    z_ptr,  # (rows, C) out, rows = N * P * Q
    index_ptr,  # (rows, C) uint8 out: tap r * S + s of the maximum, or NO_GRADIENT; None: not wanted
    rows,
    C,
    H,
    W,
    P,
    Q,
    eps,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    ACT: tl.constexpr,  # one that never falls, so that it may follow the maximum
    C_MULTIPLE: tl.constexpr,  # a power of two that divides C
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = C // C_MULTIPLE * C_MULTIPLE
    pieces = tl.cdiv(C, BLOCK_C)
    i_row, i_c = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    o_row = i_row * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m_row, m_c = o_row < rows, o_c < C
    o_n, o_p, o_q = o_row // (P * Q), o_row // Q % P, o_row % Q
    o_h, o_w = o_p * STRIDE_H - PAD_H, o_q * STRIDE_W - PAD_W
    if running_mean_ptr is not None:
        scale, shift = load_running(running_mean_ptr, running_var_ptr, gamma_ptr, beta_ptr, bias_ptr, eps, o_c, m_c)
    else:
        scale = tl.load(scale_ptr + o_c, mask=m_c, other=0.0)
        shift = tl.load(shift_ptr + o_c, mask=m_c, other=0.0)

    # For the sake of the one-byte index the compiler would give a thread 16 neighbours, whose accesses to the wider
    # elements would then be several, each touching a part of every sector.
    VECTOR: tl.constexpr = 128 // z_ptr.dtype.element_ty.primitive_bitwidth
    best = tl.full((BLOCK_ROWS, BLOCK_C), -float("inf"), tl.float32)
    index = tl.full((BLOCK_ROWS, BLOCK_C), NO_GRADIENT, tl.int32)
    for tap in tl.range(0, R * S, loop_unroll_factor=3):
        h, w = o_h + tap // S, o_w + tap % S
        m_in = m_row & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        o_in = ((o_n * H + h) * W + w).to(tl.int64)
        m = m_in[:, None] & m_c[None, :]
        y = tl.load(y_ptr + o_in[:, None] * C + o_c[None, :], mask=m, other=0.0)
        # Rounded before it is compared, as if it had been written: rounding makes ties, of which the first counts.
        u = (y.to(tl.float32) * scale[None, :] + shift[None, :]).to(y.dtype).to(tl.float32)
        u = tl.where(m, u, -float("inf"))
        better = (u > best) | (u != u)
        best = tl.where(better, u, best)
        index = tl.where(better, tap, index)
    z = activated(best, ACT)
    o = tl.max_contiguous(o_row.to(tl.int64)[:, None] * C + o_c[None, :], (1, VECTOR))
    m = m_row[:, None] & m_c[None, :]
    tl.store(z_ptr + o, z.to(z_ptr.dtype.element_ty), mask=m)
    if index_ptr is not None:
        if not ACT.is_identity:
            index = tl.where(opening(z, ACT), index, NO_GRADIENT)
        tl.store(index_ptr + o, index.to(tl.uint8), mask=m)


@triton.jit
def unpooled(
    dz_ptr,  # (N, P, Q, C) gradient at the pooled output
    index_ptr,  # (N, P, Q, C) uint8 from the forward pass
    o_n,  # (BLOCK_ROWS,) image, row and column of each pixel before pooling
    o_h,
    o_w,
    m_row,  # (BLOCK_ROWS,) which of them exist
    o_c,  # (BLOCK_C,) channels
    m_c,  # (BLOCK_C,) which of them exist
    C,
    P,
    Q,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(BLOCK_ROWS, BLOCK_C) fp32: the gradients of the windows whose maximum stood at each pixel."""
    o_h, o_w = o_h + PAD_H, o_w + PAD_W
    # A pixel lies in at most this many windows along each side, the last of which starts at or before it.
    HIGH: tl.constexpr = (R + STRIDE_H - 1) // STRIDE_H
    WIDE: tl.constexpr = (S + STRIDE_W - 1) // STRIDE_W
    VECTOR: tl.constexpr = 128 // dz_ptr.dtype.element_ty.primitive_bitwidth  # as in the forward pass
    g = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for i in tl.range(0, HIGH * WIDE, loop_unroll_factor=4):
        p, q = o_h // STRIDE_H - i // WIDE, o_w // STRIDE_W - i % WIDE
        r, s = o_h - p * STRIDE_H, o_w - q * STRIDE_W
        m_in = m_row & (p >= 0) & (p < P) & (r < R) & (q >= 0) & (q < Q) & (s < S)
        o_in = ((o_n * P + p) * Q + q).to(tl.int64)
        o = tl.max_contiguous(o_in[:, None] * C + o_c[None, :], (1, VECTOR))
        m = m_in[:, None] & m_c[None, :]
        index = tl.load(index_ptr + o, mask=m, other=NO_GRADIENT)
        dz = tl.load(dz_ptr + o, mask=m, other=0.0).to(tl.float32)
        g += tl.where(index.to(tl.int32) == (r * S + s)[:, None], dz, 0.0)
    return g


@triton.jit(do_not_specialize=["rows", "H", "W", "P", "Q"])
def stem_pool_backward_kernel(
    dz_ptr,  # (N, P, Q, C) gradient at the pooled output
    index_ptr,  # (N, P, Q, C) uint8 from the forward pass
    g_ptr,  # (rows, C) out, rows = N * H * W: the gradient behind the normalisation
    rows,
    C,
    H,
    W,
    P,
    Q,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    C_MULTIPLE: tl.constexpr,  # a power of two that divides C
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = C // C_MULTIPLE * C_MULTIPLE
    pieces = tl.cdiv(C, BLOCK_C)
    i_row, i_c = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    o_row = i_row * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m_row, m_c = o_row < rows, o_c < C
    g = unpooled(
        dz_ptr, index_ptr, o_row // (H * W), o_row // W % H, o_row % W, m_row, o_c, m_c, C, P, Q, R, S, STRIDE_H,
        STRIDE_W, PAD_H, PAD_W, BLOCK_ROWS, BLOCK_C,
    )  # fmt: skip
    o = o_row.to(tl.int64)[:, None] * C + o_c[None, :]
    m = m_row[:, None] & m_c[None, :]
    tl.store(g_ptr + o, g.to(g_ptr.dtype.element_ty), mask=m)
