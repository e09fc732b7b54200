"""The parameter-free shortcut inside of other kernels: every stride-th pixel, the channels beside its own zero."""

import triton
import triton.language as tl

from fusedres.kernels.act_mask import load_masked_rows


@triton.jit
def load_zero_padded(
    x_ptr,  # (N, H, W, C) what takes the shortcut, storage dtype
    o_n,  # (BLOCK_ROWS,) image, row and column of the shortcut's output
    o_p,
    o_q,
    m_row,  # (BLOCK_ROWS,) which of them exist
    o_k,  # (BLOCK_K,) channels of the output
    C,
    H,
    W,
    stride_h,
    stride_w,
    FIRST: tl.constexpr,  # the output's channel that x's first one becomes
    C_MULTIPLE: tl.constexpr,  # a power of two that divides C
):
    """(BLOCK_ROWS, BLOCK_K) fp32."""
    C = C // C_MULTIPLE * C_MULTIPLE
    o_row = (o_n.to(tl.int64) * H + o_p * stride_h) * W + o_q * stride_w
    o_c = o_k - FIRST
    m = m_row[:, None] & ((o_c >= 0) & (o_c < C))[None, :]
    return tl.load(x_ptr + o_row[:, None] * C + o_c[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def load_zero_padded_grad(
    g_ptr,  # (N, P, Q, K) gradient at the shortcut's output; POOLED: (N, K)
    mask_ptr,  # as in `load_masked`, or None
    o_n,  # (BLOCK_ROWS,) image, row and column of its input
    o_h,
    o_w,
    m_row,  # (BLOCK_ROWS,) which of them exist
    first_c,  # the tile's first channel of the input
    last_c,  # channels from here on are outside
    images,
    K,
    P,
    Q,
    stride_h,
    stride_w,
    FIRST: tl.constexpr,  # as in `load_zero_padded`; a multiple of 8 where there are bits
    K_MULTIPLE: tl.constexpr,  # a power of two that divides K
    POOLED: tl.constexpr,
    ACT: tl.constexpr,  # that the mask is of, or None
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(BLOCK_ROWS, BLOCK_C) fp32, zero at the pixels that the shortcut leaves out."""
    K = K // K_MULTIPLE * K_MULTIPLE
    m_row = m_row & (o_h % stride_h == 0) & (o_w % stride_w == 0)
    o_row = (o_n.to(tl.int64) * P + o_h // stride_h) * Q + o_w // stride_w
    o_g = o_n.to(tl.int64) if POOLED else o_row
    return load_masked_rows(
        g_ptr, mask_ptr, 0, o_g, o_row, first_c + FIRST, m_row, last_c + FIRST, images * P * Q, K, K, False, ACT, False,
        BLOCK_ROWS, BLOCK_C,
    )  # fmt: skip
