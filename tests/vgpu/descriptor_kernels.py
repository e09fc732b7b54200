"""Kernels that move tiles by tensor descriptors."""

from tests.vgpu_support import REASON, skip_module_without_vgpu

if REASON is not None:
    skip_module_without_vgpu()

import triton
import triton.language as tl


@triton.jit
def window_kernel(
    x_ptr,  # (N, H, W, C)
    y_ptr,  # (blocks, BLOCK_H, BLOCK_W, C) out: windows whose corners are (i - 1, i - 2)
    N,
    H,
    W,
    C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    i = tl.program_id(0)
    x = tl.make_tensor_descriptor(x_ptr, [N, H, W, C], [H * W * C, W * C, C, 1], [1, BLOCK_H, BLOCK_W, C])
    tile = x.load([N - 1, i - 1, i - 2, 0]).reshape(BLOCK_H * BLOCK_W, C)
    o = tl.arange(0, BLOCK_H * BLOCK_W)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(y_ptr + i * BLOCK_H * BLOCK_W * C + o, tile)


@triton.jit
def doubled_kernel(
    x_ptr,  # (rows, C)
    y_ptr,  # (rows, C) out: 2 x
    rows,
    C,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One block goes through many tiles, so that the buffer of its stores is written again and again."""
    y = tl.make_tensor_descriptor(y_ptr, [rows, C], [C, 1], [BLOCK_ROWS, BLOCK_C])
    o_row, o_c = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_C)
    for first in tl.range(tl.program_id(0) * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS):
        m = (first + o_row < rows)[:, None] & (o_c < C)[None, :]
        tile = tl.load(x_ptr + (first + o_row)[:, None] * C + o_c[None, :], mask=m, other=0.0)
        y.store([first, 0], 2 * tile)


@triton.jit
def matmul_kernel(
    a_ptr,  # (M, K)
    b_ptr,  # (N, K)
    c_ptr,  # (M, N) out: a b^T
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Persistent: blocks go through the tiles of c, all of them with the same three descriptors."""
    a = tl.make_tensor_descriptor(a_ptr, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    b = tl.make_tensor_descriptor(b_ptr, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    c = tl.make_tensor_descriptor(c_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    columns = tl.cdiv(N, BLOCK_N)
    for i in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * columns, tl.num_programs(0)):
        first_m, first_n = i // columns * BLOCK_M, i % columns * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            acc = tl.dot(a.load([first_m, k]), b.load([first_n, k]).T, acc)
        c.store([first_m, first_n], acc.to(c_ptr.dtype.element_ty))
