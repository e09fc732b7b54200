"""What programs left in parts, added in one order, whichever of them was finished first."""

import triton
import triton.language as tl


@triton.jit
def columns_of_parts(
    part_ptr,  # (parts, size) fp32
    o,  # (BLOCK,) columns
    m,  # (BLOCK,) which of them exist
    parts,
    size,
    BLOCK_PARTS: tl.constexpr,  # whose loads are under way together
    BLOCK: tl.constexpr,
):
    """(BLOCK,) fp32, their sums."""
    o_part = tl.arange(0, BLOCK_PARTS)
    total = tl.zeros((BLOCK_PARTS, BLOCK), tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        rows = (start + o_part).to(tl.int64)[:, None] * size
        m_part = (o_part < parts - start)[:, None] & m[None, :]
        total += tl.load(part_ptr + rows + o[None, :], mask=m_part, other=0.0).to(tl.float32)
    return tl.sum(total, axis=0)


@triton.jit
def add_parts(
    part_ptr,  # (parts, size)
    total_ptr,  # (size,) fp32 out
    i_block,
    parts,
    size,
    BLOCK_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    tl.store(total_ptr + o, columns_of_parts(part_ptr, o, m, parts, size, BLOCK_PARTS, BLOCK), mask=m)


@triton.jit(do_not_specialize=["parts"])
def sum_parts_kernel(
    part_ptr,  # (parts, size) fp32
    total_ptr,  # (size,) fp32 out
    parts,
    size,
    BLOCK_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    add_parts(part_ptr, total_ptr, tl.program_id(0), parts, size, BLOCK_PARTS, BLOCK)
