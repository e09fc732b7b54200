"""The main loop that every forward convolution shares: a product of (pixels, depth) and (depth, channels).

Depth runs over the window's taps and, within a tap, over the channels; activations are channels_last rows of pixels and
weights (K, R, S, C), so that both operands are contiguous along it. The activation is the left operand of `tl.dot`:
normalised and rectified on load it comes from registers, and copies stay asynchronous.
"""

import triton
import triton.language as tl

# Sizes that are not worth a binary of their own. Channels are not among them: 16 dividing them widens every access.
SIZES = (
    "pixels", "groups", "H", "W", "P", "Q", "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w",
    "x_row",
)  # fmt: skip


@triton.jit
def tile_of(
    groups,
    K,  # output channels of a group
    GROUPS_PER_TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """This program's tile: pixels, columns, its first group, and (BLOCK_K,) channels from that group's first on.

    Tiles of the same pixels run side by side, so that the activations of one are the cache's for the others.
    """
    per_group = tl.cdiv(GROUPS_PER_TILE * K, BLOCK_K)
    pieces = tl.cdiv(groups, GROUPS_PER_TILE) * per_group
    i_pixel, i_k = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    o_k = i_k % per_group * BLOCK_K + tl.arange(0, BLOCK_K)
    return i_pixel, i_k, i_k // per_group * GROUPS_PER_TILE, o_k


@triton.jit
def formed(
    x,  # (BLOCK_PIXELS, BLOCK_C) raw tile
    scale,  # (BLOCK_C,) fp32
    shift,  # (BLOCK_C,) fp32
):
    """relu(x * scale + shift), rounded to the storage dtype; a NaN stays one."""
    u = x.to(tl.float32) * scale[None, :] + shift[None, :]
    return tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL).to(x.dtype)


@triton.jit
def contract(
    x_ptr,  # (N, H, W, groups * C) activations, storage dtype
    w_ptr,  # (groups * K, R, S, C) weights, storage dtype
    scale_ptr,  # (groups * C,) fp32 of the prologue, or None
    shift_ptr,  # (groups * C,) fp32 of the prologue, or None
    acc,  # (BLOCK_PIXELS, BLOCK_K) fp32 that the product is added to
    o_pixel,  # (BLOCK_PIXELS,) output pixels, each inside the output
    i_group,  # first of the GROUPS_PER_TILE groups of this tile
    o_k,  # (BLOCK_K,) output channels, counted from the first of that group
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
    x_row,  # elements from one pixel of x to the next
    R: tl.constexpr,
    S: tl.constexpr,
    PADDED: tl.constexpr,  # whether a window can reach beyond the input
    FLAT: tl.constexpr,  # few channels: a row of the window is one run of memory, and depth runs along it
    GROUPS_PER_TILE: tl.constexpr,
    EVEN_C: tl.constexpr,  # whether BLOCK_C divides every tile's channels
    PRECISION: tl.constexpr,  # of `tl.dot`
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``acc`` with the product."""
    o_d = tl.arange(0, BLOCK_C)
    o_h = o_pixel // Q % P * stride_h - pad_h
    o_w = o_pixel % Q * stride_w - pad_w
    # A batch of activations can have more than 2**31 elements: pixels are counted in 64 bits, taps from there in 32.
    o_x = ((o_pixel // (P * Q)).to(tl.int64) * H + o_h) * W + o_w
    x_ptrs = x_ptr + (o_x * x_row)[:, None] + (i_group * C + o_d)[None, :]
    live = 1
    if GROUPS_PER_TILE > 1:
        live = tl.minimum(GROUPS_PER_TILE, groups - i_group)  # the last tile may hold fewer groups
    # Channels beyond K read the last one's weights; nobody stores what they give.
    o_k = tl.minimum(o_k, live * K - 1)
    w_ptrs = w_ptr + ((i_group * K + o_k).to(tl.int64) * (R * S * C))[None, :] + o_d[:, None]

    if FLAT:
        run = S * C
        for start in range(0, R * run, BLOCK_C):
            d = start + o_d
            r, e = d // run, d % run
            h, column = o_h[:, None] + (r * dilation_h)[None, :], (o_w * C)[:, None] + e[None, :]
            m = (d < R * run)[None, :] & (h >= 0) & (h < H) & (column >= 0) & (column < W * C)
            o_run = (r * dilation_h * W * C + e - o_d)[None, :]
            x = tl.load(x_ptrs + o_run, mask=m, other=0.0)
            w = tl.load(w_ptrs + start, mask=(d < R * run)[:, None], other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
        return acc

    if PADDED:
        # Bit s of columns, bit r of rows: whether that tap lies inside the input. Small windows have a bit for each
        # pair, the lowest of which is the next tap's.
        rows = tl.zeros((BLOCK_PIXELS,), tl.int32)
        columns = tl.zeros((BLOCK_PIXELS,), tl.int32)
        inside = tl.zeros((BLOCK_PIXELS,), tl.int32)
        for i_r in tl.static_range(R):
            h = o_h + i_r * dilation_h
            rows |= ((h >= 0) & (h < H)).to(tl.int32) << i_r
        for i_s in tl.static_range(S):
            column = o_w + i_s * dilation_w
            columns |= ((column >= 0) & (column < W)).to(tl.int32) << i_s
        if R * S < 32:
            for i_r in tl.static_range(R):
                inside |= tl.where((rows >> i_r & 1) != 0, columns << (i_r * S), 0)
    channels = live * C
    pieces = tl.cdiv(channels, BLOCK_C)
    r, s, c = 0, 0, 0
    for _ in range(R * S * pieces):
        o_tap = (r * dilation_h * W + s * dilation_w) * x_row + c
        if PADDED:
            m_in = ((inside if R * S < 32 else (rows >> r) & (columns >> s)) & 1) != 0
        if PADDED and EVEN_C:
            x = tl.load(x_ptrs + o_tap, mask=m_in[:, None], other=0.0)
        elif PADDED:
            x = tl.load(x_ptrs + o_tap, mask=m_in[:, None] & (c + o_d < channels)[None, :], other=0.0)
        elif EVEN_C:
            x = tl.load(x_ptrs + o_tap)
        else:
            x = tl.load(x_ptrs + o_tap, mask=(c + o_d < channels)[None, :], other=0.0)
        if GROUPS_PER_TILE > 1:
            # Block diagonal: a column's own group's channels, zero for the others'.
            in_group = c + o_d[:, None] - (o_k // K * C)[None, :]
            m_w = (in_group >= 0) & (in_group < C)
            w = tl.load(w_ptrs + ((r * S + s) * C + c - o_k // K * C), mask=m_w, other=0.0)
        elif EVEN_C:
            w = tl.load(w_ptrs + ((r * S + s) * C + c))
        else:
            w = tl.load(w_ptrs + ((r * S + s) * C + c), mask=(c + o_d < channels)[:, None], other=0.0)
        if scale_ptr is not None:
            m_c = c + o_d < channels
            scale = tl.load(scale_ptr + i_group * C + c + o_d, mask=m_c, other=0.0)
            shift = tl.load(shift_ptr + i_group * C + c + o_d, mask=m_c, other=0.0)
            u = x.to(tl.float32) * scale[None, :] + shift[None, :]
            if PADDED:
                # Padding comes after the prologue: it is zero and not relu(shift). A bound on fp32 values is one
                # instruction for each; choosing between packed 16-bit ones, as the compiler would a mask, is three.
                bound = tl.where(m_in, float("inf"), 0.0)
                u = tl.minimum(u, bound[:, None], propagate_nan=tl.PropagateNan.ALL)
            x = tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL).to(x.dtype)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        c += BLOCK_C
        step = (c >= channels).to(tl.int32)
        if PADDED and R * S < 32:
            inside = inside >> step
        s += step
        c = tl.where(step != 0, 0, c)
        r = tl.where(s < S, r, r + 1)
        s = tl.where(s < S, s, 0)
    return acc
