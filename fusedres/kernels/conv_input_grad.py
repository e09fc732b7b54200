"""The gradient of a convolution's input, with all that surrounds it joined: one pass from gradient to gradient.

Depth runs over the window's taps and, within a tap, over the output's channels, whose gradient dy is formed on load. A
strided convolution's input falls into classes of pixels (row and column modulo the stride), each of which some of the
taps reach: a tile holds pixels of one class and goes through its taps alone, so that nothing is multiplied by zero.

The moments form adds a second contraction (the input with a small square matrix). Behind the sum stand the shortcut's
gradient, or the producer's activation with the two sums that its batch norm needs.
"""

import triton
import triton.language as tl

from fusedres.kernels.act_mask import bits_of, load_masked_rows, load_open, word_pointers
from fusedres.kernels.activation import behind, opening
from fusedres.kernels.forming import formed_gradient, kept, of_channels, product, widened
from fusedres.kernels.main_loop import SIZES, contract, in_rows, late_range, tile_of
from fusedres.kernels.pixel_classes import first_tap, pixels_of
from fusedres.kernels.rows import row_of
from fusedres.kernels.zero_pad_shortcut import load_zero_padded_grad

CLASSES = ("tiles", "step_r", "step_s", "row_step", "column_step", "constants")
ADDED = ("x_H", "x_W", "x_stride_h", "x_stride_w", "add_P", "add_Q", "add_stride_h", "add_stride_w")


@triton.jit
def _load_tile(
    pointers,  # (BLOCK_PIXELS, n)
    m_in,  # (BLOCK_PIXELS,) where there is dy, if WINDOWED
    m_k,  # (n,) what belongs to the tile's groups, unless EVEN_K
    WINDOWED: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """What is there, zero elsewhere, with no more masks than are needed."""
    if WINDOWED and EVEN_K:
        tile = tl.load(pointers, mask=m_in[:, None], other=0)
    elif WINDOWED:
        tile = tl.load(pointers, mask=m_in[:, None] & m_k[None, :], other=0)
    elif EVEN_K:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=m_k[None, :], other=0)
    return tile


@triton.jit
def _contract_gradient(
    g_ptr,
    mask_ptr,
    y_ptr,
    p_ptr,
    q_ptr,
    r_ptr,
    mean_ptr,
    w_ptr,
    o_n,  # (BLOCK_PIXELS,) images
    o_p,  # (BLOCK_PIXELS,) row and column of dy under the first tap
    o_q,
    o_row,  # (BLOCK_PIXELS,) int64, where that is among the pixels of dy
    first_r,  # first tap of the class along each side, the taps from one to the next, and how many there are
    first_s,
    step_r,
    step_s,
    taps_r,
    taps_s,
    row_step,  # rows and columns of dy between two taps
    column_step,
    i_group,
    o_c,  # (BLOCK_C,) input channels, counted from the first of the group
    images,
    groups,
    C,
    K,
    P,
    Q,
    R: tl.constexpr,
    S: tl.constexpr,
    WINDOWED: tl.constexpr,
    POOLED: tl.constexpr,
    GROUPS_PER_TILE: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_C: tl.constexpr,
    ACT: tl.constexpr,
    PAIRS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_PIXELS, BLOCK_C) fp32: dy with the transposed weight."""
    o_d = tl.arange(0, BLOCK_K)
    o_g = o_n.to(tl.int64) if POOLED else o_row
    o_in = (i_group * K + o_d)[None, :]
    g_ptrs = g_ptr + (o_g * (groups * K))[:, None] + o_in
    if q_ptr is not None:
        y_ptrs = y_ptr + (o_row * (groups * K))[:, None] + o_in
    BITS: tl.constexpr = mask_ptr is not None and mask_ptr.dtype.element_ty.is_int()
    if BITS:
        WORD: tl.constexpr = mask_ptr.dtype.element_ty.primitive_bitwidth
        SPAN: tl.constexpr = WORD if WORD < BLOCK_K else BLOCK_K
        o_word = tl.arange(0, BLOCK_K // SPAN) * SPAN
    elif mask_ptr is not None:
        mask_ptrs = mask_ptr + (o_row * (groups * K))[:, None] + o_in
    live = 1
    if GROUPS_PER_TILE > 1:
        live = tl.minimum(GROUPS_PER_TILE, groups - i_group)  # the last tile may hold fewer groups
    depth = live * K
    m_c = o_c < live * C
    w_ptrs = w_ptr + ((i_group * K + o_d).to(tl.int64) * (R * S * C))[:, None] + o_c[None, :]
    if GROUPS_PER_TILE > 1:
        w_ptrs = w_ptrs - (o_c // C * C)[None, :]

    if WINDOWED:
        # Bit i of rows and columns: whether dy exists under the i-th tap of the class.
        rows = tl.zeros((BLOCK_PIXELS,), tl.int32)
        columns = tl.zeros((BLOCK_PIXELS,), tl.int32)
        for i_r in tl.static_range(R):
            under = o_p - i_r * row_step
            rows |= ((under >= 0) & (under < P)).to(tl.int32) << i_r
        for i_s in tl.static_range(S):
            under = o_q - i_s * column_step
            columns |= ((under >= 0) & (under < Q)).to(tl.int32) << i_s
    acc = tl.zeros((BLOCK_PIXELS, BLOCK_C), tl.float32)
    pieces = tl.cdiv(depth, BLOCK_K)
    i_r, i_s, k = 0, 0, 0
    # As in `contract`.
    for _ in range(tl.maximum(taps_r * taps_s * pieces, 1)):
        o_tap = -(i_r * row_step * Q + i_s * column_step)
        m_k = k + o_d < depth
        m_in = None
        if WINDOWED:
            m_in = ((rows >> i_r) & (columns >> i_s) & 1) != 0
        o = o_tap * (groups * K) + k
        o_pooled = k if POOLED else o
        dy = _load_tile(g_ptrs + o_pooled, m_in, m_k, WINDOWED, EVEN_K)
        if mask_ptr is not None:
            if BITS:
                first_k = i_group * K + k
                words_at = word_pointers(mask_ptr, o_tap, o_row, first_k + o_word, images * P * Q, groups * K)
                words = _load_tile(words_at, m_in, k + o_word < depth, WINDOWED, EVEN_K)
                open_ = bits_of(words, 0 if SPAN == WORD else first_k % WORD, BLOCK_PIXELS, BLOCK_K, SPAN)
            else:
                open_ = opening(_load_tile(mask_ptrs + o, m_in, m_k, WINDOWED, EVEN_K), ACT)
            if p_ptr is None:
                dy = behind(dy, open_, ACT)
        if p_ptr is not None:
            g, y, q, r, mean = widened(dy, PAIRS), None, None, None, None
            if mask_ptr is not None:
                g = behind(g, open_, ACT)  # one instruction for each, and three for two in 16 bits
            o_k = i_group * K + k + o_d
            p = of_channels(p_ptr, o_k, m_k, EVEN_K)
            if q_ptr is not None:
                y = widened(_load_tile(y_ptrs + o, m_in, m_k, WINDOWED, EVEN_K), PAIRS)
                if mean_ptr is not None:
                    mean = of_channels(mean_ptr, o_k, m_k, EVEN_K)
                q, r = of_channels(q_ptr, o_k, m_k, EVEN_K), of_channels(r_ptr, o_k, m_k, EVEN_K)
            wide_dy = formed_gradient(g, y, p, q, r, mean, None)
            # Where there is no dy its parts are not zero with r.
            if WINDOWED and not PAIRS and q_ptr is not None:
                # A product is one instruction for each; choosing between 16-bit ones, as the compiler would a mask, is
                # three.
                wide_dy *= m_in.to(tl.float32)[:, None]
            dy = wide_dy.to(dy.dtype)
            if WINDOWED and PAIRS and q_ptr is not None:
                dy = kept(dy, tl.where(m_in, -1, 0)[:, None])
        o_w = ((first_r + i_r * step_r) * S + first_s + i_s * step_s) * C + k * (R * S * C)
        if GROUPS_PER_TILE > 1:
            # Block diagonal: a column's own group's channels, zero for the others'.
            in_group = k + o_d[:, None] - (o_c // C * K)[None, :]
            w = tl.load(w_ptrs + o_w, mask=(in_group >= 0) & (in_group < K) & m_c[None, :], other=0.0)
        elif EVEN_K and EVEN_C:
            w = tl.load(w_ptrs + o_w)
        else:
            w = tl.load(w_ptrs + o_w, mask=m_k[:, None] & m_c[None, :], other=0.0)
        acc = product(dy, w, acc, PRECISION)
        k += BLOCK_K
        step = (k >= depth).to(tl.int32)
        i_s += step
        k = tl.where(step != 0, 0, k)
        i_r = tl.where(i_s < taps_s, i_r, i_r + 1)
        i_s = tl.where(i_s < taps_s, i_s, 0)
    return acc


@triton.jit(do_not_specialize=[*SIZES, *CLASSES, *ADDED], do_not_specialize_on_alignment=["groups"])
def conv_input_grad_kernel(
    g_ptr,  # (N, P, Q, groups * K) gradient behind the batch norm, or dy itself without p; POOLED: (N, groups * K)
    mask_ptr,  # as in `load_masked`, or None
    y_ptr,  # (N, P, Q, groups * K) raw convolution output; None together with q
    p_ptr,  # (groups * K,) fp32 of dy = p * g + q * (y - mean) + r, or None: dy = g
    q_ptr,  # (groups * K,) fp32, or None
    r_ptr,  # (groups * K,) fp32; None together with q
    mean_ptr,  # (groups * K,) fp32, or None: zero
    w_ptr,  # (groups * K, R, S, C) weights, storage dtype
    quadratic_ptr,  # (C, TERMS, C) of the moments form, storage dtype: the input with every term is added; or None
    constant_ptr,  # (constants, C) fp32, terms of what is added to every pixel that the convolution reads; or None
    x_ptr,  # (N, x_H, x_W, groups * C) what the convolution consumed; None where it is not needed
    x_scale_ptr,  # (groups * C,) fp32 where it consumed act(x * scale + shift), or None
    x_shift_ptr,  # (groups * C,) fp32, or None
    x_mean_ptr,  # (groups * C,) fp32, with the producer's sums
    raw_ptr,  # (N, H, W, groups * C) what the producer's batch norm normalised, where that is not x, or None
    open_ptr,  # with raw: the mask of what the convolution consumed (`load_masked`), or None: x itself tells it
    add_ptr,  # (N, H, W, groups * C) another gradient of the input, or of its zero-pad shortcut, or None
    add_mask_ptr,  # its mask, or None
    onto_ptr,  # (N, H, W, groups * C) what is written is this plus x_scale times the gradient, with sums; or None
    out_ptr,  # (N, H, W, groups * C) out: the input's gradient, behind the producer's activation with sums
    part_g_ptr,  # (classes * tiles, groups * C) fp32 out, sum of the gradient; None: no producer
    part_gd_ptr,  # as many, sum of the gradient times (y - mean) with the producer's y, x or raw
    pixels,  # N * H * W
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
    tiles,  # tiles along the pixels of the largest class
    step_r,  # taps from one that reaches a class to the next
    step_s,
    row_step,  # rows of dy between these
    column_step,
    constants,
    x_row,  # elements from one pixel of x to the next, and where there is onto of it and out; None: groups * C
    x_H,  # as H and W, but where the gradient is wanted at every x_stride-th pixel of x alone
    x_W,
    x_stride_h,
    x_stride_w,
    add_C,  # what the zero-pad shortcut is told of its output
    add_P,
    add_Q,
    add_stride_h,
    add_stride_w,
    R: tl.constexpr,
    S: tl.constexpr,
    TERMS: tl.constexpr,
    STRIDED: tl.constexpr,
    SAME: tl.constexpr,  # whether dy has the input's pixels: stride 1, and as many of them
    X_SAME: tl.constexpr,  # whether these are x's
    WINDOWED: tl.constexpr,  # whether some tap of some pixel has no dy
    POOLED: tl.constexpr,
    ADD_POOLED: tl.constexpr,  # whether what is added has one value for all pixels of an image
    ADD_FIRST: tl.constexpr,  # as in `load_zero_padded_grad`; None: what is added is of the input's size
    ADD_MULTIPLE: tl.constexpr,  # a power of two that divides add_C
    GROUPS_PER_TILE: tl.constexpr,
    EVEN_K: tl.constexpr,  # whether BLOCK_K divides every tile's output channels
    EVEN_C: tl.constexpr,  # whether BLOCK_C divides the input channels
    EVEN_DEPTH: tl.constexpr,  # whether BLOCK_K divides C
    ACT: tl.constexpr,  # that the mask is of, or None
    X_ACT: tl.constexpr,  # that made what the convolution consumed, or None
    ADD_ACT: tl.constexpr,  # that what is added has a mask of, or None
    PAIRS: tl.constexpr,  # see `widened`
    APART: tl.constexpr,  # see `in_rows`
    TF32: tl.constexpr,
    C_MULTIPLE: tl.constexpr,  # powers of two that divide C and x_row, and K
    K_MULTIPLE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    C, K = C // C_MULTIPLE * C_MULTIPLE, K // K_MULTIPLE * K_MULTIPLE
    x_row = row_of(x_row, groups * C, C_MULTIPLE)
    i_tile, _, i_group, first_c = tile_of(groups, C, GROUPS_PER_TILE, BLOCK_C)
    i_class, class_h, class_w, high, wide = 0, 0, 0, H, W
    first, count = i_tile * BLOCK_PIXELS, pixels
    first_r, first_s, taps_r, taps_s = 0, 0, R, S
    if STRIDED:
        i_class, first = i_tile // tiles, i_tile % tiles * BLOCK_PIXELS
        class_h, class_w = i_class // stride_w, i_class % stride_w
        high, wide = tl.cdiv(H - class_h, stride_h), tl.cdiv(W - class_w, stride_w)
        count = pixels // (H * W) * high * wide
        high, wide = tl.maximum(high, 1), tl.maximum(wide, 1)
        first_r = first_tap(class_h, pad_h, dilation_h, stride_h, R)
        first_s = first_tap(class_w, pad_w, dilation_w, stride_w, S)
        taps_r, taps_s = tl.cdiv(R - first_r, step_r), tl.cdiv(S - first_s, step_s)
    seen, o_n, o_h, o_w = pixels_of(
        first + tl.arange(0, BLOCK_PIXELS), count, class_h, class_w, high, wide, stride_h, stride_w, STRIDED
    )
    o_p, o_q = o_h + pad_h, o_w + pad_w
    if STRIDED:
        o_p, o_q = (o_p - first_r * dilation_h) // stride_h, (o_q - first_s * dilation_w) // stride_w
    o_dy = seen.to(tl.int64) + (pad_h * Q + pad_w) if SAME else (o_n.to(tl.int64) * P + o_p) * Q + o_q
    # A class may be empty, or reached by no tap: its gradient is zero then.
    reached = (count > 0) & (taps_r * taps_s > 0) if STRIDED else True
    acc = tl.zeros((BLOCK_PIXELS, BLOCK_C), tl.float32)
    if reached:
        acc = _contract_gradient(
            g_ptr, mask_ptr, y_ptr, p_ptr, q_ptr, r_ptr, mean_ptr, w_ptr, o_n, o_p, o_q, o_dy, first_r, first_s,
            step_r, step_s, taps_r, taps_s, row_step, column_step, i_group, first_c + tl.arange(0, BLOCK_C),
            pixels // (H * W), groups, C, K, P, Q, R, S, WINDOWED, POOLED, GROUPS_PER_TILE, EVEN_K, EVEN_C, ACT, PAIRS,
            "tf32" if TF32 else "ieee", BLOCK_PIXELS, BLOCK_C, BLOCK_K,
        )  # fmt: skip

    o_row, o_c = late_range(BLOCK_PIXELS), first_c + late_range(BLOCK_C)
    m_row = o_row < count - first
    _, o_n, o_h, o_w = pixels_of(first + o_row, count, class_h, class_w, high, wide, stride_h, stride_w, STRIDED)
    o_at = (o_n.to(tl.int64) * H + o_h) * W + o_w if STRIDED else first.to(tl.int64) + o_row
    o_out = i_group * C + o_c
    m_c = (o_c < GROUPS_PER_TILE * C) & (o_out < groups * C)
    # The pixels that a strided 1x1 convolution reads are its first class. The mean of the input cancels against the
    # constant there, and three products in TF32 keep the digits that it does so with.
    DIGITS: tl.constexpr = "tf32x3" if TF32 else "ieee"
    if quadratic_ptr is not None:  # noqa: SIM102 (a choice of the compiler's, then one of the program's)
        if i_class == 0:
            # As the taps of a window that does not move.
            acc = contract(
                x_ptr, quadratic_ptr, x_scale_ptr, x_shift_ptr, None, acc, seen, 0, o_c, 1, C, C, x_H, x_W, P, Q,
                x_stride_h, x_stride_w, 0, 0, 0, 0, x_row, 1, TERMS, False, X_SAME, 1, EVEN_DEPTH, X_ACT, PAIRS,
                DIGITS, BLOCK_PIXELS, BLOCK_C, BLOCK_K,
            )  # fmt: skip
            constant = tl.zeros((BLOCK_C,), tl.float32)
            for i in range(constants):
                constant += tl.load(constant_ptr + i * C + o_out, mask=m_c, other=0.0)
            acc += constant[None, :]

    m = m_row[:, None] & m_c[None, :]
    o_x = o_at[:, None] * x_row + o_out[None, :]
    o = o_x if onto_ptr is not None else o_at[:, None] * (groups * C) + o_out[None, :]
    first_c += i_group * C
    last_c = tl.minimum((i_group + GROUPS_PER_TILE) * C, groups * C)
    if add_ptr is not None:
        if ADD_FIRST is None:
            o_add = o_n.to(tl.int64) if ADD_POOLED else o_at
            acc += load_masked_rows(
                add_ptr, add_mask_ptr, 0, o_add, o_at, first_c, m_row, last_c, pixels, groups * C, groups * C, True,
                ADD_ACT, False, BLOCK_PIXELS, BLOCK_C,
            )  # fmt: skip
        else:
            acc += load_zero_padded_grad(
                add_ptr, add_mask_ptr, o_n, o_h, o_w, m_row, first_c, last_c, pixels // (H * W), add_C, add_P, add_Q,
                add_stride_h, add_stride_w, ADD_FIRST, ADD_MULTIPLE, ADD_POOLED, ADD_ACT, BLOCK_PIXELS,
                BLOCK_C,
            )  # fmt: skip
    if part_g_ptr is not None:
        y = tl.load(x_ptr + o_x if raw_ptr is None else raw_ptr + o, mask=m, other=0.0)
        wide_y = y.to(tl.float32)
        if open_ptr is not None:
            if open_ptr.dtype.element_ty.is_int():
                open_ = load_open(
                    open_ptr, 0, o_at, first_c, m_row, last_c, pixels, groups * C, True, BLOCK_PIXELS, BLOCK_C
                )
            else:
                open_ = opening(tl.load(open_ptr + o, mask=m, other=0.0), X_ACT)
        elif raw_ptr is not None:
            open_ = acc
            if not X_ACT.is_identity:
                open_ = opening(tl.load(x_ptr + o_x, mask=m, other=0.0), X_ACT)
        else:
            scale = tl.load(x_scale_ptr + o_out, mask=m_c, other=0.0)
            shift = tl.load(x_shift_ptr + o_out, mask=m_c, other=0.0)
            # Rounded as it was when the convolution consumed it: what became zero then has no gradient.
            open_ = opening((wide_y * scale[None, :] + shift[None, :]).to(y.dtype), X_ACT)
        mean = tl.load(x_mean_ptr + o_out, mask=m_c, other=0.0)
        g = behind(acc, open_, X_ACT)
        if onto_ptr is not None:
            onto = tl.load(onto_ptr + o, mask=m, other=0.0).to(tl.float32)
            out = (onto + g * scale[None, :]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + o, in_rows(out, APART, BLOCK_PIXELS, BLOCK_C), mask=m)
        else:
            g = in_rows(g.to(out_ptr.dtype.element_ty), APART, BLOCK_PIXELS, BLOCK_C)
            tl.store(out_ptr + o, g, mask=m)
        g = tl.where(m, g.to(tl.float32), 0.0)
        o_part = i_tile.to(tl.int64) * (groups * C) + o_out
        tl.store(part_g_ptr + o_part, tl.sum(g, axis=0), mask=m_c)
        tl.store(part_gd_ptr + o_part, tl.sum(g * (wide_y - mean[None, :]), axis=0), mask=m_c)
    else:
        tl.store(out_ptr + o, in_rows(acc.to(out_ptr.dtype.element_ty), APART, BLOCK_PIXELS, BLOCK_C), mask=m)
