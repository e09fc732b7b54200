"""A convolution that writes its raw output, and measures it for batch norm while it is at hand."""

import triton
import triton.language as tl

from fusedres.kernels.bn_statistics import store_tile_statistics
from fusedres.kernels.main_loop import SIZES, contract, in_rows, late_range, tile_of
from fusedres.kernels.rows import row_of


@triton.jit(do_not_specialize=[*SIZES, "y_row"], do_not_specialize_on_alignment=["groups"])
def conv_forward_kernel(
    x_ptr,  # (N, H, W, groups * C) activations, storage dtype
    w_ptr,  # (groups * K, R, S, C) weights, storage dtype
    x_scale_ptr,  # (groups * C,) fp32: act(x * scale + shift) is what is convolved; None: x itself
    x_shift_ptr,  # (groups * C,) fp32, or None
    ones_ptr,  # as in `contract`
    y_ptr,  # (pixels, groups * K) out, storage dtype
    count_ptr,  # (tiles,) fp32 out, pixels of each tile; None: no statistics
    mean_ptr,  # (tiles, groups * K) fp32 out
    m2_ptr,  # (tiles, groups * K) fp32 out, sum of (y - mean)^2 of y as stored
    pixels,  # N * P * Q
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
    x_row,  # elements from one pixel of x to the next, a multiple of C_MULTIPLE; None: groups * C
    y_row,  # of y, a multiple of K_MULTIPLE; None: groups * K
    R: tl.constexpr,
    S: tl.constexpr,
    PADDED: tl.constexpr,  # whether a window can reach beyond the input
    SAME: tl.constexpr,  # see `contract`
    GROUPS_PER_TILE: tl.constexpr,
    EVEN_C: tl.constexpr,
    X_ACT: tl.constexpr,  # of the prologue, or None
    TF32: tl.constexpr,
    PAIRS: tl.constexpr,  # see `contract`
    APART: tl.constexpr,  # see `in_rows`
    C_MULTIPLE: tl.constexpr,  # powers of two that divide C and K, and the rows that are given
    K_MULTIPLE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    PRECISION: tl.constexpr = "tf32" if TF32 else "ieee"
    C, K = C // C_MULTIPLE * C_MULTIPLE, K // K_MULTIPLE * K_MULTIPLE
    x_row = row_of(x_row, groups * C, C_MULTIPLE)
    i_pixel, i_k, i_group, first_k = tile_of(groups, K, GROUPS_PER_TILE, BLOCK_K)
    # Rows beyond the output read the last pixel's window: no mask in the loop, and nobody stores what they give.
    o_pixel = tl.minimum(i_pixel * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS), pixels - 1)
    o_k = first_k + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_PIXELS, BLOCK_K), tl.float32)
    acc = contract(
        x_ptr, w_ptr, x_scale_ptr, x_shift_ptr, ones_ptr, acc, o_pixel, i_group, o_k, groups, C, K, H, W, P, Q,
        stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, x_row, R, S, PADDED, SAME, GROUPS_PER_TILE,
        EVEN_C, X_ACT, PAIRS, PRECISION, BLOCK_PIXELS, BLOCK_K, BLOCK_C,
    )  # fmt: skip

    y = in_rows(acc.to(y_ptr.dtype.element_ty), APART, BLOCK_PIXELS, BLOCK_K)
    first = i_pixel.to(tl.int64) * BLOCK_PIXELS
    o_row, o_k = late_range(BLOCK_PIXELS), first_k + late_range(BLOCK_K)
    o_out = i_group * K + o_k
    count = tl.minimum(pixels - i_pixel * BLOCK_PIXELS, BLOCK_PIXELS)
    m_row = o_row < count
    m_out = (o_k < GROUPS_PER_TILE * K) & (o_out < groups * K)
    y_row = row_of(y_row, groups * K, K_MULTIPLE)
    o = o_row[:, None] * y_row + o_out[None, :]
    tl.store(y_ptr + first * y_row + o, y, mask=m_row[:, None] & m_out[None, :])
    if mean_ptr is not None:
        store_tile_statistics(y, m_row, m_out, count, i_pixel, o_out, groups * K, count_ptr, mean_ptr, m2_ptr, i_k == 0)
