"""The true single pass: convolve, normalise, add the shortcut, activate; the raw output never exists.

The shortcut is a tensor in memory, as it is or normalised, or the projection of one: a second contraction.
"""

import triton
import triton.language as tl

from fusedres.kernels.bn_statistics import store_tile_statistics
from fusedres.kernels.epilogue import normalised, store_activated
from fusedres.kernels.main_loop import SIZES, contract, late_range, tile_of
from fusedres.kernels.rows import load_in_fours, row_of
from fusedres.kernels.zero_pad_shortcut import load_zero_padded

SHORTCUT_SIZES = (
    "second_H", "second_W", "second_stride_h", "second_stride_w", "residual_H", "residual_W", "residual_stride_h",
    "residual_stride_w",
)  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, *SHORTCUT_SIZES], do_not_specialize_on_alignment=["groups"])
def conv_bn_act_kernel(
    x_ptr,  # (N, H, W, groups * C) activations, storage dtype
    w_ptr,  # (groups * K, R, S, C) weights, storage dtype
    x_scale_ptr,  # (groups * C,) fp32: act(x * scale + shift) is what is convolved; None: x itself
    x_shift_ptr,  # (groups * C,) fp32, or None
    ones_ptr,  # as in `contract`
    scale_ptr,  # (groups * K,) fp32, of the output; None: it is not multiplied
    shift_ptr,  # (groups * K,) fp32; None: nothing is added
    running_mean_ptr,  # (groups * K,) any dtype, or None: scale and shift are formed here, as in `load_running`
    running_var_ptr,  # (groups * K,) any dtype, or None
    gamma_ptr,  # (groups * K,) any dtype, or None
    beta_ptr,  # (groups * K,) any dtype, or None
    bias_ptr,  # (groups * K,) any dtype, or None
    residual_ptr,  # (pixels, groups * K) storage dtype, or (N, residual_H, residual_W, residual_C), or None
    residual_scale_ptr,  # (groups * K,) fp32 where the residual is a raw projection, else None
    residual_shift_ptr,  # (groups * K,) fp32, or None
    second_x_ptr,  # (N, second_H, second_W, second_C): what the projection consumes, or None
    second_w_ptr,  # (groups * K, second_C) its 1x1 weights
    second_x_scale_ptr,  # (second_C,) fp32 of its prologue, or None
    second_x_shift_ptr,  # (second_C,) fp32, or None
    second_scale_ptr,  # (groups * K,) fp32, of its output, or None
    second_shift_ptr,  # (groups * K,) fp32, or None
    second_running_mean_ptr,  # the projection's own batch norm in evaluation, as above
    second_running_var_ptr,
    second_gamma_ptr,
    second_beta_ptr,
    second_bias_ptr,
    z_ptr,  # (pixels, groups * K) out
    mask_ptr,  # out, as in `store_activated`, or None
    count_ptr,  # (tiles,) fp32 out, pixels of each tile; None: no statistics of z
    mean_ptr,  # (tiles, groups * K) fp32 out
    m2_ptr,  # (tiles, groups * K) fp32 out
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
    residual_C,
    residual_H,
    residual_W,
    residual_stride_h,
    residual_stride_w,
    second_C,
    second_H,
    second_W,
    second_stride_h,
    second_stride_w,
    eps,
    second_eps,
    R: tl.constexpr,
    S: tl.constexpr,
    PADDED: tl.constexpr,  # whether a window can reach beyond the input
    SAME: tl.constexpr,  # see `contract`; of the second contraction
    SECOND_SAME: tl.constexpr,
    GROUPS_PER_TILE: tl.constexpr,
    EVEN_C: tl.constexpr,
    SECOND_EVEN_C: tl.constexpr,
    RESIDUAL_FIRST: tl.constexpr,  # as in `load_zero_padded`; None: the residual is of the output's size
    X_ACT: tl.constexpr,  # of the prologues, or None
    SECOND_X_ACT: tl.constexpr,
    ACT: tl.constexpr,  # behind the sum
    TF32: tl.constexpr,
    PAIRS: tl.constexpr,  # see `contract`
    APART: tl.constexpr,  # see `in_rows`
    C_MULTIPLE: tl.constexpr,  # powers of two that divide C and x_row, K, second_C and residual_C
    K_MULTIPLE: tl.constexpr,
    SECOND_C_MULTIPLE: tl.constexpr,
    RESIDUAL_MULTIPLE: tl.constexpr,
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

    first = i_pixel.to(tl.int64) * BLOCK_PIXELS
    o_row, o_k = late_range(BLOCK_PIXELS), first_k + late_range(BLOCK_K)
    o_out = i_group * K + o_k
    count = tl.minimum(pixels - i_pixel * BLOCK_PIXELS, BLOCK_PIXELS)
    m_row = o_row < count
    m_out = (o_k < GROUPS_PER_TILE * K) & (o_out < groups * K)
    z = normalised(
        acc, scale_ptr, shift_ptr, running_mean_ptr, running_var_ptr, gamma_ptr, beta_ptr, bias_ptr, eps, o_out, m_out
    )  # fmt: skip
    if second_x_ptr is not None:
        second_C = second_C // SECOND_C_MULTIPLE * SECOND_C_MULTIPLE
        acc = tl.zeros((BLOCK_PIXELS, BLOCK_K), tl.float32)
        acc = contract(
            second_x_ptr, second_w_ptr, second_x_scale_ptr, second_x_shift_ptr, None, acc, o_pixel, 0, o_out, 1,
            second_C, groups * K, second_H, second_W, P, Q, second_stride_h, second_stride_w, 0, 0, 1, 1, second_C, 1,
            1, False, SECOND_SAME, 1, SECOND_EVEN_C, SECOND_X_ACT, PAIRS, PRECISION,
            BLOCK_PIXELS, BLOCK_K, BLOCK_C,
        )  # fmt: skip
        z += normalised(
            acc, second_scale_ptr, second_shift_ptr, second_running_mean_ptr, second_running_var_ptr, second_gamma_ptr,
            second_beta_ptr, second_bias_ptr, second_eps, o_out, m_out,
        )  # fmt: skip
    o = o_row[:, None] * (groups * K) + o_out[None, :]
    m = m_row[:, None] & m_out[None, :]
    first_k += i_group * K
    last_k = tl.minimum((i_group + GROUPS_PER_TILE) * K, groups * K)
    if residual_ptr is not None:
        BITS: tl.constexpr = residual_ptr.dtype.element_ty.primitive_bitwidth
        if w_ptr.dtype.element_ty.primitive_bitwidth < BITS and RESIDUAL_FIRST is None:
            residual = load_in_fours(
                residual_ptr + first * (groups * K), o_row, first_k, groups * K, m_row, last_k, BLOCK_PIXELS, BLOCK_K
            )  # fmt: skip
        elif RESIDUAL_FIRST is None:
            residual = tl.load(residual_ptr + first * (groups * K) + o, mask=m, other=0.0).to(tl.float32)
        else:
            residual = load_zero_padded(
                residual_ptr, o_pixel // (P * Q), o_pixel // Q % P, o_pixel % Q, m_row, o_out,
                residual_C, residual_H, residual_W, residual_stride_h, residual_stride_w, RESIDUAL_FIRST,
                RESIDUAL_MULTIPLE,
            )  # fmt: skip
        z += normalised(
            residual, residual_scale_ptr, residual_shift_ptr, None, None, None, None, None, 0.0, o_out, m_out
        )  # fmt: skip
    z = store_activated(
        z, z_ptr, mask_ptr, first, o_row, o_out, m_row, m_out, first_k, last_k, pixels, groups * K, ACT, False, APART,
        BLOCK_PIXELS, BLOCK_K,
    )  # fmt: skip
    if mean_ptr is not None:
        store_tile_statistics(z, m_row, m_out, count, i_pixel, o_out, groups * K, count_ptr, mean_ptr, m2_ptr, i_k == 0)
