"""Small Triton kernels that between them use what compiled kernels use of a GPU."""

from tests.vgpu_support import REASON, skip_module_without_vgpu

if REASON is not None:
    skip_module_without_vgpu()

import triton
import triton.language as tl


@triton.jit
def affine_kernel(
    x_ptr,  # (n,)
    shift_ptr,  # (n,) or None
    y_ptr,  # (n,) out
    n,
    scale,  # fp32
    skip,  # x[skip:] is taken, so x holds n + skip numbers
    NEGATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    y = tl.load(x_ptr + o + skip, mask=m, other=0.0).to(tl.float32) * scale
    if shift_ptr is not None:
        y += tl.load(shift_ptr + o, mask=m, other=0.0).to(tl.float32)
    if NEGATE:
        y = -y
    tl.store(y_ptr + o, y.to(y_ptr.dtype.element_ty), mask=m)


@triton.jit
def select_kernel(
    a_ptr,  # (n,)
    b_ptr,  # (n,)
    y_ptr,  # (n,) out: a where first, else b
    n,
    first,  # bool
    BLOCK: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    y = tl.where(first, tl.load(a_ptr + o, mask=m, other=0.0), tl.load(b_ptr + o, mask=m, other=0.0))
    tl.store(y_ptr + o, y, mask=m)


@triton.jit
def halves_kernel(
    x_ptr,  # (n,) bf16
    keep_ptr,  # (n,) int16
    wide_ptr,  # (n,) fp32 out: x
    kept_ptr,  # (n,) bf16 out: the bits of x that keep has
    n,
    BLOCK: tl.constexpr,
):
    """PTX on registers that hold two values."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    x = tl.load(x_ptr + o, mask=m, other=0.0)
    keep = tl.load(keep_ptr + o, mask=m, other=0)
    widen: tl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
    tl.store(wide_ptr + o, tl.inline_asm_elementwise(widen, "=r,=r,r", [x], tl.float32, is_pure=True, pack=2), mask=m)
    both = tl.inline_asm_elementwise("and.b32 $0, $1, $2;", "=r,r,r", [x, keep], x.dtype, is_pure=True, pack=2)
    tl.store(kept_ptr + o, both, mask=m)


@triton.jit
def wide_number_kernel(
    y_ptr,  # (1,) int64 out
    number,
):
    tl.store(y_ptr, tl.full((), 3, tl.int64) * number)


@triton.jit
def grid_kernel(
    y_ptr,  # (z, y, x, 2) int32 out: number of the block, and of blocks
):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i = (z * tl.num_programs(1) + y) * tl.num_programs(0) + x
    tl.store(y_ptr + 2 * i, i)
    tl.store(y_ptr + 2 * i + 1, tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2))


@triton.jit
def functions_kernel(
    x_ptr,  # (n,) positive fp32
    y_ptr,  # (6, n) out: exp(-x), log, sqrt, rsqrt, 1 / x, sigmoid
    n,
    BLOCK: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    x = tl.load(x_ptr + o, mask=m, other=1.0)
    tl.store(y_ptr + o, tl.exp(-x), mask=m)
    tl.store(y_ptr + n + o, tl.log(x), mask=m)
    tl.store(y_ptr + 2 * n + o, tl.sqrt(x), mask=m)
    tl.store(y_ptr + 3 * n + o, tl.rsqrt(x), mask=m)
    tl.store(y_ptr + 4 * n + o, 1.0 / x, mask=m)
    tl.store(y_ptr + 5 * n + o, tl.sigmoid(x), mask=m)


@triton.jit
def column_sums_kernel(
    x_ptr,  # (rows, C)
    y_ptr,  # (2, C) fp32 out: sums, and sums of squares
    rows,
    C,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    total = tl.zeros((BLOCK_C,), tl.float32)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, rows, BLOCK_ROWS):
        o_row = first + tl.arange(0, BLOCK_ROWS)
        m = (o_row < rows)[:, None] & m_c[None, :]
        x = tl.load(x_ptr + o_row[:, None] * C + o_c[None, :], mask=m, other=0.0).to(tl.float32)
        total += tl.sum(x, 0)
        squares += tl.sum(x * x, 0)
    tl.store(y_ptr + o_c, total, mask=m_c)
    tl.store(y_ptr + C + o_c, squares, mask=m_c)


@triton.jit
def softmax_kernel(
    x_ptr,  # (rows, C)
    y_ptr,  # (rows, C) out
    C,
    BLOCK_C: tl.constexpr,
):
    i_row = tl.program_id(0)
    o = tl.arange(0, BLOCK_C)
    m = o < C
    x = tl.load(x_ptr + i_row * C + o, mask=m, other=float("-inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(y_ptr + i_row * C + o, (e / tl.sum(e, 0)).to(y_ptr.dtype.element_ty), mask=m)


@triton.jit
def running_sum_kernel(
    x_ptr,  # (ROWS, C)
    y_ptr,  # (ROWS, C) out: sums of each row up to there
    ROWS: tl.constexpr,
    C: tl.constexpr,
):
    o = tl.arange(0, ROWS)[:, None] * C + tl.arange(0, C)[None, :]
    y = tl.cumsum(tl.load(x_ptr + o).to(tl.float32), 1)
    tl.store(y_ptr + o, y.to(y_ptr.dtype.element_ty))


@triton.jit
def transpose_kernel(
    x_ptr,  # (rows, columns)
    y_ptr,  # (columns, rows) out
    rows,
    columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    o_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    m_row, m_column = o_row < rows, o_column < columns
    x = tl.load(x_ptr + o_row[:, None] * columns + o_column[None, :], mask=m_row[:, None] & m_column[None, :], other=0)
    m = m_column[:, None] & m_row[None, :]
    tl.store(y_ptr + o_column[:, None] * rows + o_row[None, :], tl.trans(x), mask=m)


@triton.jit
def strided_copy_kernel(
    x_ptr,  # (n * STRIDE,)
    y_ptr,  # (n,) out: every STRIDE-th number
    n,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    tl.store(y_ptr + o, tl.load(x_ptr + o * STRIDE, mask=m, other=0), mask=m)


@triton.jit
def pack_signs_kernel(
    x_ptr,  # (8 * n,)
    bits_ptr,  # (n,) uint8 out: bit i of byte b is x[8 b + i] > 0
    n,
    BLOCK: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_bit = tl.arange(0, 8)
    x = tl.load(x_ptr + o[:, None] * 8 + o_bit[None, :], mask=(o < n)[:, None], other=0.0)
    bits = tl.sum((x > 0).to(tl.int32) << o_bit[None, :], 1)
    tl.store(bits_ptr + o, bits.to(tl.uint8), mask=o < n)


@triton.jit
def collatz_kernel(
    x_ptr,  # (n,) int32
    y_ptr,  # (n,) int32 out: steps of the Collatz sequence to 1, at most `most`
    n,
    most,
    BLOCK: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    x = tl.load(x_ptr + o, mask=m, other=1)
    steps = tl.zeros((BLOCK,), tl.int32)
    for _ in range(most):
        going = x > 1
        steps += going.to(tl.int32)
        x = tl.where(going, tl.where(x % 2 == 0, x // 2, 3 * x + 1), x)
    tl.store(y_ptr + o, steps, mask=m)


@triton.jit
def matmul_kernel(
    a_ptr,  # (M, K), any strides
    b_ptr,  # (K, N), any strides
    c_ptr,  # (M, N) out, contiguous
    M,
    N,
    K,
    a_row,
    a_column,
    b_row,
    b_column,
    SQUARE_A: tl.constexpr,  # a² in place of a, so that a comes from registers
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr = None,
):
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < M, o_n < N
    c = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, BLOCK_K):
        o_k = first + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        a = tl.load(a_ptr + o_m[:, None] * a_row + o_k[None, :] * a_column, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b = tl.load(b_ptr + o_k[:, None] * b_row + o_n[None, :] * b_column, mask=m_k[:, None] & m_n[None, :], other=0.0)
        if SQUARE_A:
            a = a * a
        c = tl.dot(a, b, c, input_precision=PRECISION)
    m = m_m[:, None] & m_n[None, :]
    tl.store(c_ptr + o_m[:, None] * N + o_n[None, :], c.to(c_ptr.dtype.element_ty), mask=m)


@triton.jit
def conv_kernel(
    x_ptr,  # (N, H, W, C)
    w_ptr,  # (K, R, S, C)
    y_ptr,  # (N, P, Q, K) out
    scale_ptr,  # (C,) fp32
    shift_ptr,  # (C,) fp32
    sums_ptr,  # (tiles of pixels, K) fp32 out: sums of y over the pixels of a tile
    H,
    W,
    C,
    P,
    Q,
    K,
    pixels,  # N * P * Q
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    NORMALISE: tl.constexpr,  # relu(scale * x + shift) in place of x
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_pixel, i_k = tl.program_id(0), tl.program_id(1)
    o_pixel = i_pixel * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m_pixel, m_k = o_pixel < pixels, o_k < K
    o_image, o_p, o_q = o_pixel // (P * Q), o_pixel // Q % P, o_pixel % Q
    o_h, o_w = o_p * STRIDE - PAD, o_q * STRIDE - PAD
    y = tl.zeros((BLOCK_PIXELS, BLOCK_K), tl.float32)
    pieces = tl.cdiv(C, BLOCK_C)
    for i in range(R * S * pieces):
        tap, o_c = i // pieces, i % pieces * BLOCK_C + tl.arange(0, BLOCK_C)
        h, w = o_h + tap // S, o_w + tap % S
        m_c = o_c < C
        m_inside = m_pixel & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        o_x = ((o_image * H + h) * W + w)[:, None] * C + o_c[None, :]
        x = tl.load(x_ptr + o_x, mask=m_inside[:, None] & m_c[None, :], other=0.0)
        if NORMALISE:
            scale = tl.load(scale_ptr + o_c, mask=m_c, other=0.0)
            shift = tl.load(shift_ptr + o_c, mask=m_c, other=0.0)
            u = tl.maximum(x.to(tl.float32) * scale[None, :] + shift[None, :], 0.0)
            x = tl.where(m_inside[:, None], u, 0.0).to(x_ptr.dtype.element_ty)
        o_w_ptr = (o_k[None, :] * (R * S) + tap) * C + o_c[:, None]
        weight = tl.load(w_ptr + o_w_ptr, mask=m_c[:, None] & m_k[None, :], other=0.0)
        y = tl.dot(x, weight, y)
    tl.store(sums_ptr + i_pixel * K + o_k, tl.sum(y, 0), mask=m_k)
    m = m_pixel[:, None] & m_k[None, :]
    tl.store(y_ptr + o_pixel[:, None] * K + o_k[None, :], y.to(y_ptr.dtype.element_ty), mask=m)
