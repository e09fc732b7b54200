"""What stands behind a sum: batch norm, the shortcut, the activation, and what a backward pass wants to know of it."""

import triton
import triton.language as tl

from fusedres.kernels.act_mask import word_pointers, words_of
from fusedres.kernels.activation import activated
from fusedres.kernels.bn_finalize import load_running
from fusedres.kernels.main_loop import in_rows


@triton.jit
def once(
    x,  # (COLUMNS,) fp32
):
    """``x``, computed by a thread for each value and handed to the others.

    The compiler would rather compute it where it is needed: a root and a quotient in each thread for every column of an
    accumulator that it holds, 700 instructions of a tile of 128 x 128. It does not look behind a sum.
    """
    return tl.sum(tl.join(x, tl.zeros_like(x)), axis=1)


@triton.jit
def normalised(
    acc,  # (ROWS, COLUMNS) fp32
    scale_ptr,  # (C,) fp32, or None
    shift_ptr,  # (C,) fp32, or None
    running_mean_ptr,  # as in `load_running`; None: scale and shift are what is given
    running_var_ptr,
    gamma_ptr,
    beta_ptr,
    bias_ptr,
    eps,
    o,  # (COLUMNS,) channels
    m,  # (COLUMNS,) which of them exist
):
    """``acc`` behind its batch norm, or with a convolution's bias, or as it is."""
    if running_mean_ptr is not None:
        scale, shift = load_running(running_mean_ptr, running_var_ptr, gamma_ptr, beta_ptr, bias_ptr, eps, o, m)
        acc = acc * once(scale)[None, :] + once(shift)[None, :]
    elif scale_ptr is not None:
        scale = tl.load(scale_ptr + o, mask=m, other=0.0)
        shift = tl.load(shift_ptr + o, mask=m, other=0.0)
        acc = acc * scale[None, :] + shift[None, :]
    elif shift_ptr is not None:
        acc += tl.load(shift_ptr + o, mask=m, other=0.0)[None, :]
    return acc


@triton.jit
def store_activated(
    v,  # (ROWS, COLUMNS) fp32 input of the activation
    z_ptr,  # (rows, C) out
    mask_ptr,  # out, bits of where z is open (`word_pointers`), or (rows, C) v; None: not wanted
    first,  # int64, the tile's first row
    o_row,  # (ROWS,) rows, counted from there
    o_c,  # (COLUMNS,) channels
    m_row,  # (ROWS,) which of them exist
    m_c,  # (COLUMNS,)
    first_c,  # the tile's first channel, and where it ends
    last_c,
    rows,
    C,
    ACT: tl.constexpr,
    ZEROED: tl.constexpr,  # whether z is zero in channels that do not exist
    APART: tl.constexpr,  # see `in_rows`
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """z as it was stored. A word's channels have to lie in one tile: WORD divides its bounds, or it is the only one."""
    o = o_row[:, None] * C + o_c[None, :]
    m = m_row[:, None] & m_c[None, :]
    z = in_rows(activated(v, ACT).to(z_ptr.dtype.element_ty), APART, ROWS, COLUMNS)
    tl.store(z_ptr + first * C + o, z, mask=m)
    if mask_ptr is not None:
        if mask_ptr.dtype.element_ty.is_int():
            WORD: tl.constexpr = mask_ptr.dtype.element_ty.primitive_bitwidth
            o_word = first_c + tl.arange(0, COLUMNS // WORD) * WORD
            # Rows outside the tensor are not zero: the shift is added there too.
            m_word = m_row[:, None] & (o_word < last_c)[None, :]
            words = words_of(z if ZEROED else tl.where(m_c[None, :], z, 0.0), mask_ptr, ACT, ROWS, COLUMNS)
            tl.store(word_pointers(mask_ptr, first, o_row, o_word, rows, C), words, mask=m_word)
        else:
            tl.store(mask_ptr + first * C + o, in_rows(v.to(mask_ptr.dtype.element_ty), APART, ROWS, COLUMNS), mask=m)
    return z
