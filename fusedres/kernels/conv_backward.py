"""Both gradients of a narrow convolution of stride 1 in one pass over the operands that they share.

The input's gradient goes through the taps of the window at a tile of input pixels, and what it multiplies there, dy
under a tap, is what the weight's gradient multiplies with the input at the same pixels: each is read and formed once
for both. The sums of the weight's gradient wait in registers, one tile for every tap, while a program goes through its
part of the pixels; a second kernel adds the parts in a fixed order.
"""

import triton
import triton.language as tl

from fusedres.kernels.act_mask import bits_of, load_masked_rows, word_pointers
from fusedres.kernels.activation import behind, opening
from fusedres.kernels.forming import formed_gradient, formed_input, of_channels, product
from fusedres.kernels.main_loop import SIZES
from fusedres.kernels.rows import row_of
from fusedres.kernels.zero_pad_shortcut import load_zero_padded_grad


@triton.jit
def _parts_of_dy(
    g_ptrs,  # (BLOCK_PIXELS, BLOCK_K)
    mask_ptrs,  # as many, or (BLOCK_PIXELS, BLOCK_K // WORD) of bits, or None
    y_ptrs,  # (BLOCK_PIXELS, BLOCK_K), or None
    m_in,  # (BLOCK_PIXELS,) where there is dy
    K,
    WORD: tl.constexpr,  # bits of a word; 0: the mask has a value for each of g
    BLOCK_K: tl.constexpr,
):
    """Tiles of g, of its mask and of y as they are in memory; g again in place of one that is not there."""
    m = m_in[:, None] & (tl.arange(0, BLOCK_K) < K)[None, :]
    g = tl.load(g_ptrs, mask=m, other=0.0)
    mask, y = g, g
    if mask_ptrs is not None:
        if WORD > 0:
            m_word = m_in[:, None] & (tl.arange(0, BLOCK_K // WORD) * WORD < K)[None, :]
            mask = tl.load(mask_ptrs, mask=m_word, other=0)
        else:
            mask = tl.load(mask_ptrs, mask=m, other=0.0)
    if y_ptrs is not None:
        y = tl.load(y_ptrs, mask=m, other=0.0)
    return g, mask, y


@triton.jit(do_not_specialize=[*SIZES, "pixels_per_part", "add_P", "add_Q", "add_stride_h", "add_stride_w"])
def conv_backward_kernel(
    g_ptr,  # (N, P, Q, K) gradient behind the batch norm, or dy itself without p; POOLED: (N, K)
    mask_ptr,  # as in `load_masked`, or None
    y_ptr,  # (N, P, Q, K) raw convolution output; None together with q
    p_ptr,  # (K,) fp32 of dy = p * g + q * (y - mean) + r, or None: dy = g
    q_ptr,  # (K,) fp32, or None
    r_ptr,  # (K,) fp32; None together with q
    mean_ptr,  # (K,) fp32, or None: zero
    w_ptr,  # (K, R, S, C) weights, storage dtype
    x_ptr,  # (N, H, W, C) input, storage dtype
    x_scale_ptr,  # (C,) fp32: u = act(x * scale + shift); None: u = x
    x_shift_ptr,  # (C,) fp32, or None
    x_mean_ptr,  # (C,) fp32, with the producer's sums
    raw_ptr,  # (N, H, W, C) what the producer's batch norm normalised, where that is not x, or None
    add_ptr,  # (N, H, W, C) another gradient of the input, or of its zero-pad shortcut, or None
    add_mask_ptr,  # its mask, or None
    onto_ptr,  # (N, H, W, C) what is written is this plus x_scale times the gradient, with sums; or None
    out_ptr,  # (N, H, W, C) out: the input's gradient, behind the producer's activation with sums
    part_g_ptr,  # (parts, C) fp32 out, sum of the gradient; None: no producer
    part_gd_ptr,  # (parts, C) fp32 out, sum of the gradient times (y - mean) with the producer's y, x or raw
    dw_ptr,  # (parts, K, R, S, C) fp32 out
    pixels,  # N * H * W
    pixels_per_part,  # a multiple of BLOCK_PIXELS
    C,
    K,
    H,
    W,
    P,
    Q,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    x_row,  # elements from one pixel of x to the next, and where there is onto of it and out; None: C
    add_C,  # what the zero-pad shortcut is told of its output
    add_P,
    add_Q,
    add_stride_h,
    add_stride_w,
    R: tl.constexpr,
    S: tl.constexpr,
    WINDOWED: tl.constexpr,  # whether some tap of some pixel has no dy
    POOLED: tl.constexpr,
    ADD_POOLED: tl.constexpr,  # whether what is added has one value for all pixels of an image
    ADD_FIRST: tl.constexpr,  # as in `load_zero_padded_grad`; None: what is added is of the input's size
    ADD_MULTIPLE: tl.constexpr,  # a power of two that divides add_C
    ACT: tl.constexpr,  # that the mask is of, or None
    X_ACT: tl.constexpr,  # that made what the convolution consumed, or None
    ADD_ACT: tl.constexpr,  # that what is added has a mask of, or None
    TF32: tl.constexpr,
    C_MULTIPLE: tl.constexpr,  # powers of two that divide C and x_row, and K
    K_MULTIPLE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,  # not below K
):
    C, K = C // C_MULTIPLE * C_MULTIPLE, K // K_MULTIPLE * K_MULTIPLE
    x_row = row_of(x_row, C, C_MULTIPLE)
    PRECISION: tl.constexpr = "tf32" if TF32 else "ieee"
    TAPS: tl.constexpr = R * S
    BITS: tl.constexpr = mask_ptr is not None and mask_ptr.dtype.element_ty.is_int()
    WORD: tl.constexpr = mask_ptr.dtype.element_ty.primitive_bitwidth if BITS else 0
    # Programs of the same pixels run side by side, so that the dy of one is the cache's for the others.
    pieces = tl.cdiv(C, BLOCK_C)
    i_part, i_c = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    o_row, o_k, o_c = tl.arange(0, BLOCK_PIXELS), tl.arange(0, BLOCK_K), i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_k, m_c = o_k < K, o_c < C
    if x_scale_ptr is not None:
        scale = tl.load(x_scale_ptr + o_c, mask=m_c, other=0.0)
        shift = tl.load(x_shift_ptr + o_c, mask=m_c, other=0.0)
    if part_g_ptr is not None:
        mean = tl.load(x_mean_ptr + o_c, mask=m_c, other=0.0)
        sum_g, sum_gd = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    dw = (tl.zeros((BLOCK_C, BLOCK_K), tl.float32),) * TAPS

    start = i_part * pixels_per_part
    for first in range(start, tl.minimum(start + pixels_per_part, pixels), BLOCK_PIXELS):
        o_pixel = first + o_row
        m_row = o_pixel < pixels
        o_at = o_pixel.to(tl.int64)
        m = m_row[:, None] & m_c[None, :]
        o_x = o_at[:, None] * x_row + o_c[None, :]
        o = o_x if onto_ptr is not None else o_at[:, None] * C + o_c[None, :]
        x = tl.load(x_ptr + o_x, mask=m, other=0.0)
        u = x
        if x_scale_ptr is not None:
            u = formed_input(x, scale[None, :], shift[None, :], None, None, X_ACT, False, False)
            u = tl.where(m, u, 0.0)

        o_n, o_p, o_q = o_pixel // (H * W), o_pixel // W % H + pad_h, o_pixel % W + pad_w
        o_dy = (o_n.to(tl.int64) * P + o_p) * Q + o_q
        o_g = o_n.to(tl.int64) if POOLED else o_dy
        g_ptrs = g_ptr + (o_g * K)[:, None] + o_k[None, :]
        mask_ptrs, y_ptrs = None, None
        if mask_ptr is not None:
            if BITS:
                o_word = tl.arange(0, BLOCK_K // WORD) * WORD
                mask_ptrs = word_pointers(mask_ptr, 0, o_dy, o_word, pixels // (H * W) * P * Q, K)
            else:
                mask_ptrs = mask_ptr + (o_dy * K)[:, None] + o_k[None, :]
        if y_ptr is not None:
            y_ptrs = y_ptr + (o_dy * K)[:, None] + o_k[None, :]
        m_in = m_row
        if WINDOWED:
            m_in = m_row & (o_p >= 0) & (o_p < P) & (o_q >= 0) & (o_q < Q)
        g, mask, y = _parts_of_dy(g_ptrs, mask_ptrs, y_ptrs, m_in, K, WORD, BLOCK_K)
        w_ptrs = w_ptr + (o_k * (TAPS * C))[:, None] + o_c[None, :]
        acc = tl.zeros((BLOCK_PIXELS, BLOCK_C), tl.float32)
        summed = ()
        for i_tap in tl.static_range(TAPS):
            if mask_ptr is not None:
                open_ = bits_of(mask, 0, BLOCK_PIXELS, BLOCK_K, WORD) if BITS else opening(mask, ACT)
                g = behind(g, open_, ACT)
            dy = g
            if mask_ptr is None and p_ptr is None:
                # Through registers: of a copy that arrives in shared memory for both products Triton 3.8 keeps one
                # place, and lets the next overwrite it while wgmma, the slower of the two, still reads it.
                dy = tl.where(m_in[:, None], g, 0.0)
            if p_ptr is not None:
                p, q, r, y_mean = of_channels(p_ptr, o_k, m_k, False), None, None, None
                if q_ptr is not None:
                    q, r = of_channels(q_ptr, o_k, m_k, False), of_channels(r_ptr, o_k, m_k, False)
                    if mean_ptr is not None:
                        y_mean = of_channels(mean_ptr, o_k, m_k, False)
                inside = m_in.to(tl.float32)
                dy = formed_gradient(g.to(tl.float32), y.to(tl.float32), p, q, r, y_mean, inside).to(g.dtype)
            if i_tap + 1 < TAPS:
                # While the products of a tap are under way, the parts of the next arrive. Pointers move along with
                # the taps: an offset for each of these would have registers of its own throughout the loop.
                under_p, under_q = o_p - (i_tap + 1) // S * dilation_h, o_q - (i_tap + 1) % S * dilation_w
                m_in = m_row & (under_p >= 0) & (under_p < P) & (under_q >= 0) & (under_q < Q)
                rows = -dilation_w
                if (i_tap + 1) % S == 0:
                    rows = (S - 1) * dilation_w - dilation_h * Q
                if not POOLED:
                    g_ptrs += rows * K
                if mask_ptr is not None:
                    mask_ptrs += rows * (1 if WORD == 32 else tl.cdiv(K, 8) if BITS else K)
                if y_ptr is not None:
                    y_ptrs += rows * K
                g, mask, y = _parts_of_dy(g_ptrs, mask_ptrs, y_ptrs, m_in, K, WORD, BLOCK_K)
            w = tl.load(w_ptrs, mask=m_k[:, None] & m_c[None, :], other=0.0)
            w_ptrs += C
            acc = product(dy, w, acc, PRECISION)
            sums = product(tl.trans(u), dy, dw[i_tap], PRECISION)
            summed = summed + (sums,)  # noqa: RUF005 (the compiler unpacks no tuples)
        dw = summed
        if add_ptr is not None:
            if ADD_FIRST is None:
                o_add = o_n if ADD_POOLED else o_at
                acc += load_masked_rows(
                    add_ptr, add_mask_ptr, 0, o_add, o_at, i_c * BLOCK_C, m_row, C, pixels, C, C, True, ADD_ACT,
                    False, BLOCK_PIXELS, BLOCK_C,
                )  # fmt: skip
            else:
                acc += load_zero_padded_grad(
                    add_ptr, add_mask_ptr, o_n, o_pixel // W % H, o_pixel % W, m_row, i_c * BLOCK_C, C,
                    pixels // (H * W), add_C, add_P, add_Q, add_stride_h, add_stride_w, ADD_FIRST, ADD_MULTIPLE,
                    ADD_POOLED, ADD_ACT, BLOCK_PIXELS, BLOCK_C,
                )  # fmt: skip
        if part_g_ptr is not None:
            # Behind the activation of u as it was rounded: what became zero then has no gradient.
            at = u
            if X_ACT.slope is not None:
                at = (x.to(tl.float32) * scale[None, :] + shift[None, :]).to(x.dtype)
            wide_du = behind(acc, opening(at, X_ACT), X_ACT)
            if onto_ptr is not None:
                onto = tl.load(onto_ptr + o, mask=m, other=0.0).to(tl.float32)
                tl.store(out_ptr + o, (onto + wide_du * scale[None, :]).to(out_ptr.dtype.element_ty), mask=m)
            else:
                du = wide_du.to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + o, du, mask=m)
                wide_du = du.to(tl.float32)
            sum_g += tl.sum(wide_du, axis=0)
            raw = x if raw_ptr is None else tl.load(raw_ptr + o, mask=m, other=0.0)
            sum_gd += tl.sum(wide_du * (raw.to(tl.float32) - mean[None, :]), axis=0)
        else:
            tl.store(out_ptr + o, acc.to(out_ptr.dtype.element_ty), mask=m)

    if part_g_ptr is not None:
        tl.store(part_g_ptr + i_part * C + o_c, sum_g, mask=m_c)
        tl.store(part_gd_ptr + i_part * C + o_c, sum_gd, mask=m_c)
    dw_ptr += i_part.to(tl.int64) * (K * TAPS) * C
    for i_tap in tl.static_range(TAPS):
        o_dw = (o_k * TAPS + i_tap)[None, :] * C + o_c[:, None]
        tl.store(dw_ptr + o_dw, dw[i_tap], mask=m_k[None, :] & m_c[:, None])
