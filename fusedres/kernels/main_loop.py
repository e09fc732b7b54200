"""The main loop that every forward convolution shares: a product of (pixels, depth) and (depth, channels).

Depth runs over the window's taps and, within a tap, over the channels; activations are channels_last rows of pixels and
weights (K, R, S, C), so that both operands are contiguous along it. The activation is the left operand of `tl.dot`:
formed on load it comes from registers, and copies stay asynchronous.
"""

import triton
import triton.language as tl

from fusedres.kernels.forming import formed_input, of_channels, product

# Sizes that are not worth a binary of their own. Channels are not among them: 16 dividing them widens every access; nor
# are groups, since without any a tile finds its place by one division.
SIZES = (
    "pixels", "H", "W", "P", "Q", "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w",
    "x_row",
)  # fmt: skip


@triton.jit
def tile_of(
    groups,
    K,  # output channels of a group
    GROUPS_PER_TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """This program's tile: pixels, columns, its first group, and its first channel, counted from that group's first.

    Tiles of the same pixels run side by side, so that the activations of one are the cache's for the others.
    """
    per_group = tl.cdiv(GROUPS_PER_TILE * K, BLOCK_K)
    pieces = tl.cdiv(groups, GROUPS_PER_TILE) * per_group
    i_pixel, i_k = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    return i_pixel, i_k, i_k // per_group * GROUPS_PER_TILE, i_k % per_group * BLOCK_K


@triton.jit
def late_range(SIZE: tl.constexpr):
    """`tl.arange` from 0, for what stands behind a loop.

    The compiler moves what is computed before a loop and used behind it alone between the loop and the wait for its
    last products. There ptxas takes it for a use of these, and serialises every wgmma (C7514).
    """
    return tl.arange(SIZE, 2 * SIZE) - SIZE


@triton.jit
def in_rows(
    x,  # (ROWS, COLUMNS) from a product
    APART: tl.constexpr,  # whether matrix units leave neighbouring columns in different threads
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``x``; if APART, gathered in shared memory so that rows are stored whole.

    The compiler would store it as the matrix units leave it, two columns of sixteen rows at a time, a sector for each.
    It does not look behind a pair that is taken apart and put together.
    """
    if APART:
        even, odd = tl.split(tl.reshape(x, (ROWS, COLUMNS // 2, 2)))
        x = tl.reshape(tl.join(even, odd), (ROWS, COLUMNS))
    return x


@triton.jit
def in_columns(x):
    """``x`` (ROWS, COLUMNS), gathered in shared memory so that sums over rows are formed inside of threads.

    As wgmma leaves it, rows are spread over lanes: of 128 x 128 outputs, two sums over them took 192 shuffles.
    """
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    upper, lower = tl.split(tl.permute(tl.reshape(x, (ROWS // 2, 2, COLUMNS)), (0, 2, 1)))
    return tl.reshape(tl.permute(tl.join(upper, lower), (0, 2, 1)), (ROWS, COLUMNS))


@triton.jit
def contract(
    x_ptr,  # (N, H, W, groups * C) activations, storage dtype
    w_ptr,  # (groups * K, R, S, C) weights, storage dtype
    scale_ptr,  # (groups * C,) fp32 of the prologue, or None
    shift_ptr,  # (groups * C,) fp32 of the prologue, or None
    ones_ptr,  # (1,) int32 of all bits where a padded operand goes from registers to wgmma, or None
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
    SAME: tl.constexpr,  # whether the input has the output's pixels: stride 1, and as many of them
    GROUPS_PER_TILE: tl.constexpr,
    EVEN_C: tl.constexpr,  # whether BLOCK_C divides every tile's channels
    ACT: tl.constexpr,  # of the prologue
    PAIRS: tl.constexpr,  # see `widened`
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
    if SAME:
        o_x = o_pixel.to(tl.int64) - (pad_h * W + pad_w)
    else:
        o_x = ((o_pixel // (P * Q)).to(tl.int64) * H + o_h) * W + o_w
    x_ptrs = x_ptr + (o_x * x_row)[:, None] + (i_group * C + o_d)[None, :]
    live = 1
    if GROUPS_PER_TILE > 1:
        live = tl.minimum(GROUPS_PER_TILE, groups - i_group)  # the last tile may hold fewer groups
    # Channels beyond K read the last one's weights; nobody stores what they give.
    o_k = tl.minimum(o_k, live * K - 1)
    w_ptrs = w_ptr + ((i_group * K + o_k).to(tl.int64) * (R * S * C))[None, :] + o_d[:, None]

    if PADDED:
        # Bit s of columns, bit r of rows: whether that tap lies inside the input; of a small window a bit for each tap.
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
    # From the last channels of a tap to the first of the next, in its row or in the next one.
    to_column = dilation_w * x_row - (pieces - 1) * BLOCK_C
    to_row = to_column + (dilation_h * W - S * dilation_w) * x_row
    tap, r, s, c, o_tap = 0, 0, 0, 0, 0
    # ptxas serialises wgmma with a left operand in registers where a loop may be left out (C7515).
    for i in range(tl.maximum(R * S * pieces, 1)):
        if PADDED:
            m_in = ((inside >> tap if R * S < 32 else (rows >> r) & (columns >> s)) & 1) != 0
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
            w = tl.load(w_ptrs + (tap * C + c - o_k // K * C), mask=m_w, other=0.0)
        elif EVEN_C:
            w = tl.load(w_ptrs + i * BLOCK_C)
        else:
            w = tl.load(w_ptrs + (tap * C + c), mask=(c + o_d < channels)[:, None], other=0.0)
        if scale_ptr is not None:
            o_c, m_c = i_group * C + c + o_d, c + o_d < channels
            scale, shift = of_channels(scale_ptr, o_c, m_c, EVEN_C), of_channels(shift_ptr, o_c, m_c, EVEN_C)
            # Padding comes after the prologue.
            x = formed_input(x, scale, shift, m_in if PADDED else None, ones_ptr, ACT, PAIRS, True)
        acc = product(x, w, acc, PRECISION)
        c += BLOCK_C
        last = c >= channels
        s += last.to(tl.int32)
        below = s >= S
        o_tap += tl.where(last, tl.where(below, to_row, to_column), BLOCK_C)
        tap += last.to(tl.int32)
        r, s, c = tl.where(below, r + 1, r), tl.where(below, 0, s), tl.where(last, 0, c)
    return acc
