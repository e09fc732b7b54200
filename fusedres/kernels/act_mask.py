"""What tells an activation's slope inside a tile of rows: a bit for each value, or its output or input itself.

Where 32 divides the channels, bits are words of 32 channels, and the words of the same channels lie one after the other
for all rows: tiles of a few channels read and write whole sectors. Elsewhere rows are bytes of 8 channels.
"""

import triton
import triton.language as tl

from fusedres.kernels.activation import behind, opening
from fusedres.kernels.forming import widened
from fusedres.kernels.rows import along_columns


@triton.jit
def words_of(
    z,  # (BLOCK_ROWS, BLOCK_C) output of the activation
    mask_ptr,  # where its words will go
    ACT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(BLOCK_ROWS, BLOCK_C // WORD) words: bit j of word i is set where channel WORD i + j is open."""
    WORD: tl.constexpr = mask_ptr.dtype.element_ty.primitive_bitwidth
    open_ = tl.reshape(opening(z, ACT).to(tl.int32), (BLOCK_ROWS, BLOCK_C // WORD, WORD))
    return tl.sum(open_ << tl.arange(0, WORD)[None, None, :], axis=2).to(mask_ptr.dtype.element_ty)


@triton.jit
def bits_of(
    words,  # (BLOCK_ROWS, BLOCK_C // SPAN)
    first_bit,  # that SPAN of them begin with in each word: a number, or (BLOCK_C // SPAN,)
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPAN: tl.constexpr,
):
    """(BLOCK_ROWS, BLOCK_C) bool: the bits of such words (`words_of`)."""
    shifts = (first_bit + tl.zeros((BLOCK_C // SPAN,), tl.int32))[:, None] + tl.arange(0, SPAN)[None, :]
    bits = (words.to(tl.int32)[:, :, None] >> shifts[None, :, :]) & 1
    return tl.reshape(bits, (BLOCK_ROWS, BLOCK_C)) != 0


@triton.jit
def word_pointers(
    mask_ptr,  # int32 (C // 32, rows), or uint8 (rows, ceil(C / 8)), bits
    first,  # int64, the row that these are counted from
    o_row,  # (BLOCK_ROWS,) rows
    o_c,  # a channel of each word
    rows,  # of the whole tensor
    C,
):
    """(BLOCK_ROWS, words) where the bits of these rows and channels are."""
    if mask_ptr.dtype.element_ty == tl.int32:
        pointers = (mask_ptr + first + (o_c // 32).to(tl.int64) * rows)[None, :] + o_row[:, None]
    else:
        bytes_ = tl.cdiv(C, 8)
        pointers = along_columns(mask_ptr + first * bytes_, o_row[:, None] * bytes_ + (o_c // 8)[None, :], 1)
    return pointers


@triton.jit
def load_open(
    mask_ptr,  # bits, as in `word_pointers`
    first,  # int64, the row that these are counted from
    o_row,  # (BLOCK_ROWS,) rows
    first_c,  # the tile's first channel, a multiple of 8; of the tile's width or of 32, if ALIGNED
    m_row,  # (BLOCK_ROWS,) rows inside the tensor
    last_c,  # channels from here on are outside
    rows,  # of the whole tensor
    C,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(BLOCK_ROWS, BLOCK_C) bool: where the activation was open."""
    WORD: tl.constexpr = mask_ptr.dtype.element_ty.primitive_bitwidth
    # In small tiles threads that share a word take parts of it: a warp that has none would load another's again.
    EACH: tl.constexpr = BLOCK_ROWS * BLOCK_C // 256
    WIDEST: tl.constexpr = WORD if EACH >= WORD else 16 if EACH >= 16 and WORD == 32 else 8
    SPAN: tl.constexpr = 8 if not ALIGNED else WIDEST if WIDEST < BLOCK_C else BLOCK_C
    o_c = first_c + tl.arange(0, BLOCK_C // SPAN) * SPAN
    m = m_row[:, None] & (o_c < last_c)[None, :]
    words = tl.load(word_pointers(mask_ptr, first, o_row, o_c, rows, C), mask=m, other=0)
    return bits_of(words, 0 if SPAN == WORD else o_c % WORD, BLOCK_ROWS, BLOCK_C, SPAN)


@triton.jit
def load_masked(
    g_ptr,  # (rows, C) gradient at an activation's output
    mask_ptr,  # bits as in `word_pointers`, or (rows, C) what `opening` takes, or None: nothing to mask
    first,  # int64, the tile's first row
    first_c,  # its first channel
    m_row,  # (BLOCK_ROWS,) rows inside the tensor
    image,  # rows that share one of g, which is (rows // image, C) then; None: each has its own
    rows,  # of the whole tensor
    C,
    g_row,  # elements from one row of g to the next
    ACT: tl.constexpr,  # that the mask is of, or None
    PAIRS: tl.constexpr,  # see `widened`
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(BLOCK_ROWS, BLOCK_C) fp32: the gradient at the activation's input."""
    o_row = tl.arange(0, BLOCK_ROWS)
    o_g = o_row
    if image is not None:
        o_g = (first + o_row) // image
    else:
        g_ptr += first * g_row
    return load_masked_rows(
        g_ptr, mask_ptr, first, o_g, o_row, first_c, m_row, C, rows, C, g_row, True, ACT, PAIRS, BLOCK_ROWS, BLOCK_C
    )


@triton.jit
def load_masked_rows(
    g_ptr,  # (rows, C) gradient at an activation's output
    mask_ptr,  # as in `load_masked`
    first,  # int64, the row that those of the mask are counted from
    o_g,  # (BLOCK_ROWS,) rows of g
    o_row,  # (BLOCK_ROWS,) rows of the mask
    first_c,  # the tile's first channel, where there are bits as `load_open` wants it
    m_row,  # (BLOCK_ROWS,) rows inside the tensors
    last_c,  # channels from here on are outside
    rows,  # of the mask
    C,
    g_row,  # elements from one row of g to the next
    ALIGNED: tl.constexpr,
    ACT: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """As `load_masked`, of any rows and channels."""
    o_c = first_c + tl.arange(0, BLOCK_C)
    m = m_row[:, None] & (o_c < last_c)[None, :]
    g = widened(tl.load(g_ptr + o_g[:, None] * g_row + o_c[None, :], mask=m, other=0.0), PAIRS)
    if mask_ptr is not None:
        if mask_ptr.dtype.element_ty.is_int():
            open_ = load_open(mask_ptr, first, o_row, first_c, m_row, last_c, rows, C, ALIGNED, BLOCK_ROWS, BLOCK_C)
        else:
            mask = tl.load(mask_ptr + first * C + o_row[:, None] * C + o_c[None, :], mask=m, other=0.0)
            open_ = opening(mask, ACT)
        g = behind(g, open_, ACT)
    return g


@triton.jit(do_not_specialize=["rows", "image"])
def act_backward_kernel(
    g_ptr,  # (rows, C) gradient at an activation's output
    mask_ptr,  # as in `load_masked`
    out_ptr,  # (rows, C) out
    rows,
    image,  # as in `load_masked`
    C,
    ACT: tl.constexpr,
    C_MULTIPLE: tl.constexpr,  # a power of two that divides C
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = C // C_MULTIPLE * C_MULTIPLE
    pieces = tl.cdiv(C, BLOCK_C)
    i_row, i_c = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    first = i_row.to(tl.int64) * BLOCK_ROWS
    o_row, o_c = tl.arange(0, BLOCK_ROWS), i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_row = o_row < rows - first
    g = load_masked(g_ptr, mask_ptr, first, i_c * BLOCK_C, m_row, image, rows, C, C, ACT, False, BLOCK_ROWS, BLOCK_C)
    o = first * C + o_row[:, None] * C + o_c[None, :]
    tl.store(out_ptr + o, g.to(out_ptr.dtype.element_ty), mask=m_row[:, None] & (o_c < C)[None, :])
