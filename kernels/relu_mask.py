"""The ReLU's open positions inside a tile of rows: eight channels to a byte, or the rectified output itself."""

import triton
import triton.language as tl


@triton.jit
def packed(
    z,  # (BLOCK_ROWS, BLOCK_C) rectified tile
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(BLOCK_ROWS, BLOCK_C // 8) bytes: bit j of byte b is set where z is positive in channel 8 b + j."""
    open_ = tl.reshape((z > 0).to(tl.int32), (BLOCK_ROWS, BLOCK_C // 8, 8))
    return tl.sum(open_ << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)


@triton.jit
def unpacked(
    bits,  # (BLOCK_ROWS, BLOCK_C // 8) bytes
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(BLOCK_ROWS, BLOCK_C) bool: what `packed` packed."""
    bits = (bits.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (BLOCK_ROWS, BLOCK_C)) != 0


@triton.jit
def load_open(
    mask_ptr,  # (rows, ceil(C / 8)) uint8 bits
    first,  # int64, the row that these are counted from
    o_row,  # (BLOCK_ROWS,) rows
    first_c,  # the tile's first channel, a multiple of 8
    m_row,  # (BLOCK_ROWS,) rows inside the tensor
    last_c,  # channels from here on are outside
    C,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(BLOCK_ROWS, BLOCK_C) bool: where the ReLU was open."""
    bytes_ = tl.cdiv(C, 8)
    o_byte = first_c // 8 + tl.arange(0, BLOCK_C // 8)
    m = m_row[:, None] & (o_byte < tl.cdiv(last_c, 8))[None, :]
    o = o_row[:, None] * bytes_ + o_byte[None, :]
    return unpacked(tl.load(mask_ptr + first * bytes_ + o, mask=m, other=0), BLOCK_ROWS, BLOCK_C)


@triton.jit
def load_masked(
    g_ptr,  # (rows, C) gradient at a rectified output
    mask_ptr,  # (rows, ceil(C / 8)) uint8 bits, or (rows, C) the rectified output, or None: nothing to mask
    first,  # int64, the tile's first row
    i_c,  # which piece of the channels
    m_row,  # (BLOCK_ROWS,) rows inside the tensor
    image,  # rows that share one of g, which is (rows // image, C) then; None: each has its own
    C,
    g_row,  # elements from one row of g to the next
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(BLOCK_ROWS, BLOCK_C) fp32: g where the ReLU was open, zero elsewhere."""
    o_row = tl.arange(0, BLOCK_ROWS)
    o_g = o_row
    if image is not None:
        o_g = (first + o_row) // image
    else:
        g_ptr += first * g_row
    return load_masked_rows(
        g_ptr, mask_ptr, first, o_g, o_row, i_c * BLOCK_C, m_row, C, C, g_row, BLOCK_ROWS, BLOCK_C
    )  # fmt: skip


@triton.jit
def load_masked_rows(
    g_ptr,  # (rows, C) gradient at a rectified output
    mask_ptr,  # bits or the rectified output, or None, as in `load_masked`
    first,  # int64, the row that those of the mask are counted from
    o_g,  # (BLOCK_ROWS,) rows of g
    o_row,  # (BLOCK_ROWS,) rows of the mask
    first_c,  # the tile's first channel, a multiple of 8 where there are bits
    m_row,  # (BLOCK_ROWS,) rows inside the tensors
    last_c,  # channels from here on are outside
    C,
    g_row,  # elements from one row of g to the next
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """As `load_masked`, of any rows and channels."""
    o_c = first_c + tl.arange(0, BLOCK_C)
    m = m_row[:, None] & (o_c < last_c)[None, :]
    g = tl.load(g_ptr + o_g[:, None] * g_row + o_c[None, :], mask=m, other=0.0).to(tl.float32)
    if mask_ptr is not None:
        if mask_ptr.dtype.element_ty == tl.uint8:
            open_ = load_open(mask_ptr, first, o_row, first_c, m_row, last_c, C, BLOCK_ROWS, BLOCK_C)
        else:
            open_ = tl.load(mask_ptr + first * C + o_row[:, None] * C + o_c[None, :], mask=m, other=0.0) > 0
        g = tl.where(open_, g, 0.0)
    return g


@triton.jit(do_not_specialize=["rows", "image"])
def relu_backward_kernel(
    g_ptr,  # (rows, C) gradient at a rectified output
    mask_ptr,  # bits or rectified output (`load_masked`)
    out_ptr,  # (rows, C) out
    rows,
    image,  # as in `load_masked`
    C,
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
    g = load_masked(g_ptr, mask_ptr, first, i_c, m_row, image, C, C, BLOCK_ROWS, BLOCK_C)
    o = first * C + o_row[:, None] * C + o_c[None, :]
    tl.store(out_ptr + o, g.to(out_ptr.dtype.element_ty), mask=m_row[:, None] & (o_c < C)[None, :])
