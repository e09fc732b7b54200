"""A 1x1 convolution by few blocks that stay: each keeps its columns of the weight and goes through tiles of pixels.

Tiles are moved by tensor descriptors, so that the next ones are on their way while this one is multiplied, measured and
written. Statistics stay in registers until a block has ended.
"""

import triton
import triton.language as tl

from fusedres.kernels.forming import formed_input, of_channels


@triton.jit(do_not_specialize=["pixels"], do_not_specialize_on_alignment=["C", "K", "x_row", "y_row"])
def conv_pointwise_kernel(
    x_ptr,  # (pixels, C) activations, 16-bit storage dtype
    w_ptr,  # (K, C) weights, storage dtype
    x_scale_ptr,  # (C,) fp32: act(x * scale + shift) is what is convolved; None: x itself
    x_shift_ptr,  # (C,) fp32, or None
    y_ptr,  # (pixels, K) out, storage dtype
    count_ptr,  # (parts,) fp32 out, pixels of each block; None: no statistics
    mean_ptr,  # (parts, K) fp32 out
    m2_ptr,  # (parts, K) fp32 out, sum of (y - mean)^2 of y as stored
    pixels,
    C,
    K,
    x_row,  # elements from one pixel of x to the next
    y_row,  # of y
    X_ACT: tl.constexpr,  # of the prologue, or None
    PAIRS: tl.constexpr,  # see `widened`
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,  # C or more
):
    HALF: tl.constexpr = BLOCK_PIXELS // 2
    i_k, i_part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    x = tl.make_tensor_descriptor(x_ptr, [pixels, C], [x_row, 1], [BLOCK_PIXELS, BLOCK_C])
    w = tl.make_tensor_descriptor(w_ptr, [K, C], [C, 1], [BLOCK_K, BLOCK_C])
    y = tl.make_tensor_descriptor(y_ptr, [pixels, K], [y_row, 1], [BLOCK_PIXELS, BLOCK_K])
    columns = w.load([i_k * BLOCK_K, 0]).T
    o_row = tl.arange(0, BLOCK_PIXELS)[:, None]
    if x_scale_ptr is not None:
        o_c = tl.arange(0, BLOCK_C)
        scale = of_channels(x_scale_ptr, o_c, o_c < C, False)
        shift = of_channels(x_shift_ptr, o_c, o_c < C, False)
    sums = tl.zeros((HALF, BLOCK_K), tl.float32)
    squares = tl.zeros((HALF, BLOCK_K), tl.float32)
    near = tl.zeros((HALF, BLOCK_K), tl.float32)
    tiles = tl.cdiv(pixels, BLOCK_PIXELS)
    for i in tl.range(i_part, tiles, parts):
        first = i * BLOCK_PIXELS
        u = x.load([first, 0])
        if x_scale_ptr is not None:
            u = formed_input(u, scale, shift, None, None, X_ACT, PAIRS, False)
        out = tl.dot(u, columns).to(y_ptr.dtype.element_ty)
        y.store([first, i_k * BLOCK_K], out)
        if mean_ptr is not None:
            a, b = in_halves(out)
            a, b = a.to(tl.float32), b.to(tl.float32)
            m_a, m_b = in_halves((o_row < pixels - first).to(tl.float32))
            if i == i_part:
                near = a
            if x_scale_ptr is not None:
                # What is formed of the zeros beyond the last pixel is not zero.
                a, b = a * m_a, b * m_b
            a -= near * m_a
            b -= near * m_b
            sums += a + b
            squares += a * a
            squares += b * b
    if mean_ptr is not None:
        whole = (tiles - 1 - i_part) // parts
        rest = pixels - (i_part + whole * parts) * BLOCK_PIXELS
        n_a, n_b = in_halves(whole.to(tl.float32) + (o_row < rest).to(tl.float32))
        n = n_a + n_b
        count = tl.sum(n)
        # Of each place in the tiles: its pixels' mean from the first of them, and the deviations from that.
        above = sums / tl.maximum(n, 1.0)
        mean = tl.sum(n * (near + above), 0) / count
        d = near + above - mean[None, :]
        # Rounding can leave a sum of squares of equal numbers below zero; a NaN stays one.
        m2 = tl.sum(tl.maximum(squares - sums * above, 0.0, propagate_nan=tl.PropagateNan.ALL) + n * d * d, 0)
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        tl.store(mean_ptr + i_part * K + o_k, mean, mask=o_k < K)
        tl.store(m2_ptr + i_part * K + o_k, m2, mask=o_k < K)
        if i_k == 0:
            tl.store(count_ptr + i_part, count)


@triton.jit
def in_halves(x):
    """``x`` (ROWS, COLUMNS) as two tensors of half the rows, each pair of which one thread of wgmma holds."""
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    a, b = tl.split(tl.permute(tl.reshape(x, (ROWS // 16, 2, 8, COLUMNS)), (0, 2, 3, 1)))
    return tl.reshape(a, (ROWS // 2, COLUMNS)), tl.reshape(b, (ROWS // 2, COLUMNS))
