"""Kernels whose binaries are known: they copy, copy by descriptors, fill, hoard registers, and multiply matrices."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="compiling needs Triton: pip install triton")
tl = triton.language

from fusedres.compiler.binary import Binary, specialise  # noqa: E402


@triton.jit
def copy_kernel(
    x_ptr,  # (rows, C)
    y_ptr,  # (rows, C) out
    rows,
    C,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_c = tl.arange(0, BLOCK_C)
    m = (o_row < rows)[:, None] & (o_c < C)[None, :]
    o = o_row.to(tl.int64)[:, None] * C + o_c[None, :]
    tl.store(y_ptr + o, tl.load(x_ptr + o, mask=m, other=0.0), mask=m)


@triton.jit
def copy_boxes_kernel(
    x_ptr,  # (rows, C)
    y_ptr,  # (rows, C) out
    rows,
    C,
    y_row,  # elements from one row of y to the next
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    x = tl.make_tensor_descriptor(x_ptr, [rows, C], [C, 1], [BLOCK_ROWS, BLOCK_C])
    y = tl.make_tensor_descriptor(y_ptr, [rows, C], [y_row, 1], [BLOCK_ROWS, BLOCK_C])
    corner = [tl.program_id(0) * BLOCK_ROWS, tl.program_id(1) * BLOCK_C]
    y.store(corner, x.load(corner))


@triton.jit
def fill_kernel(
    y_ptr,  # (n,) out
    x_ptr,  # (1,) what to fill it with; None: 0
    n: tl.int64,
    BLOCK: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = 0.0
    if x_ptr is not None:
        x = tl.load(x_ptr)
    tl.store(y_ptr + o, x, mask=o < n)


@triton.jit
def hoard_kernel(
    x_ptr,  # (BLOCK,)
    y_ptr,  # (BLOCK,) out
    BLOCK: tl.constexpr,
):
    # Each thread holds its share of x until all of it is summed.
    o = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o)
    tl.store(y_ptr + o, x * tl.sum(x, 0))


@triton.jit
def matmul_kernel(
    a_ptr,  # (M, C)
    b_ptr,  # (C, K)
    y_ptr,  # (M, K) out
    M,
    C,
    K,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for i_c in range(0, C, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        a = tl.load(a_ptr + o_m[:, None] * C + o_c[None, :], mask=(o_m < M)[:, None] & (o_c < C)[None, :], other=0.0)
        b = tl.load(b_ptr + o_c[:, None] * K + o_k[None, :], mask=(o_c < C)[:, None] & (o_k < K)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    m = (o_m < M)[:, None] & (o_k < K)[None, :]
    tl.store(y_ptr + o_m[:, None] * K + o_k[None, :], acc.to(y_ptr.dtype.element_ty), mask=m)


def copy(dtype=torch.bfloat16, *, channels=64, block=(32, 64), num_warps=4):
    arguments = {"rows": 1024, "C": channels, "BLOCK_ROWS": block[0], "BLOCK_C": block[1]}
    return _binary(copy_kernel, dtype, ("x_ptr", "y_ptr"), arguments, num_warps)


def hoard(block=16384):
    return _binary(hoard_kernel, torch.float32, ("x_ptr", "y_ptr"), {"BLOCK": block}, num_warps=1)


def matmul(dtype=torch.bfloat16, *, precision=None, block=(128, 64, 32), num_warps=4, num_stages=3):
    sizes = {"M": 4096, "C": 512, "K": 256, "PRECISION": precision}
    tile = dict(zip(("BLOCK_M", "BLOCK_K", "BLOCK_C"), block, strict=True))
    return _binary(matmul_kernel, dtype, ("a_ptr", "b_ptr", "y_ptr"), sizes | tile, num_warps, num_stages)


def _binary(kernel, dtype, pointers, arguments, num_warps, num_stages=3):
    tensors = {name: torch.empty(1, dtype=dtype, device="meta") for name in pointers}
    return Binary(kernel, specialise(kernel, tensors | arguments), num_warps, num_stages)
