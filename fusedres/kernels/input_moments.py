"""The first two moments of a 1x1 convolution's input, about a reference row and split over the pixels.

Only tiles of the Gram matrix on or above its diagonal are computed; the second kernel adds the parts in a fixed order
and writes both halves.
"""

import triton
import triton.language as tl

from fusedres.kernels.forming import formed_input, of_channels, widened
from fusedres.kernels.main_loop import in_rows
from fusedres.kernels.small_matrices import fp32_dot, pair_of


@triton.jit
def _piece(
    x_ptr,
    scale_ptr,
    shift_ptr,
    first,  # a pixel of the 1x1 convolution's output, from which the others are counted
    m_pixel,  # (BLOCK_PIXELS,) which of these exist
    o_c,  # (BLOCK_C,) channels
    C,
    H,
    W,
    P,
    Q,
    stride_h,
    stride_w,
    STRIDED: tl.constexpr,
    EVEN_C: tl.constexpr,
    ACT: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """(BLOCK_PIXELS, BLOCK_C) input values there, formed if there is a prologue."""
    m_c, o_pixel = o_c < C, tl.arange(0, BLOCK_PIXELS)
    m = m_pixel[:, None] if EVEN_C else m_pixel[:, None] & m_c[None, :]
    if STRIDED:
        o_pixel += first
        o_x = (o_pixel // (P * Q)).to(tl.int64) * H + o_pixel // Q % P * stride_h
        o_x = (o_x * W + o_pixel % Q * stride_w) * C
        x = tl.load(x_ptr + o_x[:, None] + o_c[None, :], mask=m, other=0.0)
    else:
        from_first = x_ptr + tl.cast(first, tl.int64) * C
        x = tl.load(from_first + (o_pixel[:, None] * C + o_c[None, :]), mask=m, other=0.0)
    if scale_ptr is not None:
        scale, shift = of_channels(scale_ptr, o_c, m_c, EVEN_C), of_channels(shift_ptr, o_c, m_c, EVEN_C)
        x = formed_input(x, scale, shift, None, None, ACT, PAIRS, False)
    return x


@triton.jit
def _reference(
    u,  # (BLOCK_PIXELS, BLOCK_C) the first pixels
    m,  # (BLOCK_PIXELS,) which of them exist
    count,  # how many do
):
    """(BLOCK_C,) fp32: the mean, about which a mean that is large against the deviation can not cancel.

    In 16 bits it is rounded too, for the difference of two numbers of about one size is exact there; and it is zero
    where it is small, for then the numbers themselves are what is exact, and little cancels.
    """
    values = tl.where(m[:, None], u.to(tl.float32), 0.0)
    mean = tl.sum(values, axis=0) / count
    if u.dtype == tl.float32:
        return mean
    d = tl.where(m[:, None], values - mean[None, :], 0.0)
    return tl.where(mean * mean * count > 16.0 * tl.sum(d * d, axis=0), mean.to(u.dtype).to(tl.float32), 0.0)


@triton.jit(do_not_specialize=["pixels", "pixels_per_part", "H", "W", "P", "Q", "stride_h", "stride_w"])
def input_moments_kernel(
    x_ptr,  # (N, H, W, C) input, storage dtype
    scale_ptr,  # (C,) fp32: act(x * scale + shift) is u; None: x itself
    shift_ptr,  # (C,) fp32, or None
    row_ptr,  # (C,) fp32 out, the reference row (`_reference`)
    sum_ptr,  # (parts, C) fp32 out, sum of u - row
    gram_ptr,  # (parts, pairs, BLOCK_C, BLOCK_C) fp32 out, sum of (u - row)(u - row)^T
    pixels,  # N * P * Q
    pixels_per_part,  # a multiple of BLOCK_PIXELS
    C,
    H,
    W,
    P,
    Q,
    stride_h,
    stride_w,
    STRIDED: tl.constexpr,
    EVEN_PIXELS: tl.constexpr,  # whether BLOCK_PIXELS divides the pixels
    EVEN_C: tl.constexpr,  # whether BLOCK_C divides C
    ACT: tl.constexpr,  # of the prologue, or None
    PAIRS: tl.constexpr,  # see `widened`
    APART: tl.constexpr,  # see `in_rows`
    C_MULTIPLE: tl.constexpr,  # a power of two that divides C
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = C // C_MULTIPLE * C_MULTIPLE
    pieces = tl.cdiv(C, BLOCK_C)
    pairs = pieces * (pieces + 1) // 2
    i_part, i_pair = tl.program_id(0) // pairs, tl.program_id(0) % pairs
    i_a, i_b = pair_of(i_pair, pieces)
    o_pixel = tl.arange(0, BLOCK_PIXELS)
    o_a, o_b = i_a * BLOCK_C + tl.arange(0, BLOCK_C), i_b * BLOCK_C + tl.arange(0, BLOCK_C)

    # Every program forms the same reference row, from the first pixels.
    m = o_pixel < pixels
    count = tl.minimum(pixels, BLOCK_PIXELS)
    first = _piece(
        x_ptr, scale_ptr, shift_ptr, 0, m, o_a, C, H, W, P, Q, stride_h, stride_w, STRIDED, EVEN_C, ACT, PAIRS,
        BLOCK_PIXELS,
    )  # fmt: skip
    row_a = _reference(first, m, count)
    first = _piece(
        x_ptr, scale_ptr, shift_ptr, 0, m, o_b, C, H, W, P, Q, stride_h, stride_w, STRIDED, EVEN_C, ACT, PAIRS,
        BLOCK_PIXELS,
    )  # fmt: skip
    row_b = _reference(first, m, count)

    # Of every row of a step by itself, and in the end all together: a sum across threads is worth many additions.
    totals = tl.zeros((BLOCK_PIXELS, BLOCK_C), tl.float32)
    gram = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    begin = i_part * pixels_per_part
    for start in range(begin, tl.minimum(begin + pixels_per_part, pixels), BLOCK_PIXELS):
        m = tl.full((BLOCK_PIXELS,), True, tl.int1) if EVEN_PIXELS else start + o_pixel < pixels
        a = _piece(
            x_ptr, scale_ptr, shift_ptr, start, m, o_a, C, H, W, P, Q, stride_h, stride_w, STRIDED, EVEN_C, ACT, PAIRS,
            BLOCK_PIXELS,
        )  # fmt: skip
        b = _piece(
            x_ptr, scale_ptr, shift_ptr, start, m, o_b, C, H, W, P, Q, stride_h, stride_w, STRIDED, EVEN_C, ACT, PAIRS,
            BLOCK_PIXELS,
        )  # fmt: skip
        wide_a, wide_b = widened(a, PAIRS) - row_a[None, :], widened(b, PAIRS) - row_b[None, :]
        if not EVEN_PIXELS:
            wide_a, wide_b = tl.where(m[:, None], wide_a, 0.0), tl.where(m[:, None], wide_b, 0.0)
        a, b = wide_a.to(a.dtype), wide_b.to(b.dtype)
        # Of the rounded differences, so that both moments are those of the same numbers.
        totals += widened(a, PAIRS)
        # Statistics are never in TF32.
        gram = tl.dot(tl.trans(a), b, gram, input_precision="ieee")
    total = tl.sum(totals, axis=0)
    o_square = tl.arange(0, BLOCK_C)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    gram = in_rows(gram, APART, BLOCK_C, BLOCK_C)
    tl.store(gram_ptr + tl.program_id(0).to(tl.int64) * BLOCK_C * BLOCK_C + o_square, gram)
    if i_a == i_b:
        tl.store(sum_ptr + i_part * C + o_a, total, mask=o_a < C)
        if i_part == 0:
            tl.store(row_ptr + o_a, row_a, mask=o_a < C)


@triton.jit(do_not_specialize=["parts", "pixels", "k_pieces"])
def input_moments_finish_kernel(
    row_ptr,  # (C,) fp32
    sum_ptr,  # (parts, C) fp32
    gram_ptr,  # (parts, pairs, SIDE, SIDE) fp32
    w_ptr,  # (K, C) weights, storage dtype, of a convolution whose output is to be measured; or None
    mean_ptr,  # (C,) fp32 out
    m2_ptr,  # (C, C) fp32 out, sum of (u - mean)(u - mean)^T
    part_mean_ptr,  # (C / BLOCK_C, K) fp32 out, shares of W mean, or None
    part_m2_ptr,  # (programs of one K piece, K) fp32 out, shares of rowsum((W m2) * W), or None
    parts,
    pixels,
    k_pieces,  # into how many K is cut
    C,
    K,
    PRECISION: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,  # of a tile's rows and columns, what one program adds up
    BLOCK_K: tl.constexpr,
):
    """m2 is made tile by tile, and what each adds to the output's statistics is made of it at once."""
    pieces = tl.cdiv(C, SIDE)
    pairs = pieces * (pieces + 1) // 2
    cuts: tl.constexpr = SIDE // BLOCK_C
    i_tile, i_k = tl.program_id(0), tl.program_id(1)
    i_pair, i_row, i_column = i_tile // (cuts * cuts), i_tile // cuts % cuts, i_tile % cuts
    i_a, i_b = pair_of(i_pair, pieces)
    o_row, o_column = i_row * BLOCK_C + tl.arange(0, BLOCK_C), i_column * BLOCK_C + tl.arange(0, BLOCK_C)
    o_a, o_b, o_part = i_a * SIDE + o_row, i_b * SIDE + o_column, tl.arange(0, BLOCK_PARTS)
    m_a, m_b = o_a < C, o_b < C

    grams = tl.zeros((BLOCK_PARTS, BLOCK_C, BLOCK_C), tl.float32)
    sums_a, sums_b = tl.zeros((BLOCK_PARTS, BLOCK_C), tl.float32), tl.zeros((BLOCK_PARTS, BLOCK_C), tl.float32)
    o = (o_row[:, None] * SIDE + o_column[None, :])[None, :, :]
    for start in range(0, parts, BLOCK_PARTS):
        m_part, i_part = o_part < parts - start, start + o_part
        o_gram = (i_part * pairs + i_pair).to(tl.int64) * (SIDE * SIDE)
        grams += tl.load(gram_ptr + o_gram[:, None, None] + o, mask=m_part[:, None, None], other=0.0)
        m = m_part[:, None] & m_a[None, :]
        sums_a += tl.load(sum_ptr + i_part[:, None] * C + o_a[None, :], mask=m, other=0.0)
        m = m_part[:, None] & m_b[None, :]
        sums_b += tl.load(sum_ptr + i_part[:, None] * C + o_b[None, :], mask=m, other=0.0)
    gram, sum_a, sum_b = tl.sum(grams, axis=0), tl.sum(sums_a, axis=0), tl.sum(sums_b, axis=0)
    m2 = gram - sum_a[:, None] * sum_b[None, :] / pixels
    mean = tl.load(row_ptr + o_a, mask=m_a, other=0.0) + sum_a / pixels
    is_first = (i_a == i_b) & (i_row == i_column)
    if i_k == 0:
        m = m_a[:, None] & m_b[None, :]
        tl.store(m2_ptr + o_a[:, None] * C + o_b[None, :], m2, mask=m)
        tl.store(mean_ptr + o_a, mean, mask=m_a & is_first)
        if i_a != i_b:
            tl.store(m2_ptr + o_b[None, :] * C + o_a[:, None], m2, mask=m)
    if w_ptr is not None:
        per_piece = tl.cdiv(tl.cdiv(K, k_pieces), BLOCK_K) * BLOCK_K
        # What is across the diagonal is as much.
        twice = tl.where(i_a == i_b, 1.0, 2.0)
        for start in range(i_k * per_piece, tl.minimum(i_k * per_piece + per_piece, K), BLOCK_K):
            o_k = start + tl.arange(0, BLOCK_K)
            m_k = o_k < K
            w_a = tl.load(w_ptr + o_k[:, None] * C + o_a[None, :], mask=m_k[:, None] & m_a[None, :], other=0.0)
            w_b = tl.load(w_ptr + o_k[:, None] * C + o_b[None, :], mask=m_k[:, None] & m_b[None, :], other=0.0)
            product = fp32_dot(w_a, m2, tl.zeros((BLOCK_K, BLOCK_C), tl.float32), PRECISION)
            m2_share = twice * tl.sum(product * w_b.to(tl.float32), axis=1)
            mean_share = tl.sum(w_a.to(tl.float32) * mean[None, :], axis=1)
            tl.store(part_m2_ptr + i_tile * K + o_k, m2_share, mask=m_k)
            tl.store(part_mean_ptr + (i_a * cuts + i_row) * K + o_k, mean_share, mask=m_k & is_first)
