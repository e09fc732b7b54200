"""Kernels that are wrong, each in one way."""

from tests.vgpu_support import REASON, skip_module_without_vgpu

if REASON is not None:
    skip_module_without_vgpu()

import triton
import triton.language as tl


@triton.jit
def unmasked_kernel(
    x_ptr,  # (n,)
    y_ptr,  # (n,) out
    n,
    MASK_LOAD: tl.constexpr,
    MASK_STORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o, mask=o < n, other=0.0) if MASK_LOAD else tl.load(x_ptr + o)
    if MASK_STORE:
        tl.store(y_ptr + o, x, mask=o < n)
    else:
        tl.store(y_ptr + o, x)


@triton.jit
def tile_step_kernel(
    x_ptr,  # (n,)
    y_ptr,  # (n,) out
    n,
    STEP: tl.constexpr,  # from tile to tile; anything but BLOCK is wrong
    FIRST: tl.constexpr,  # anything but 0 is wrong
    BLOCK: tl.constexpr,
):
    o = FIRST + tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    m = o < n
    tl.store(y_ptr + o, 2 * tl.load(x_ptr + o, mask=m, other=0.0), mask=m)


@triton.jit
def one_place_kernel(
    y_ptr,  # (1,) out: every block writes here
):
    tl.store(y_ptr, tl.program_id(0))


@triton.jit
def neighbour_kernel(
    x_ptr,  # (blocks * BLOCK,): each block reads the next one's share while that one writes it
    BLOCK: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_next = (o + BLOCK) % (tl.num_programs(0) * BLOCK)
    tl.store(x_ptr + o, tl.load(x_ptr + o_next) + 1.0)


@triton.jit
def accumulate_kernel(
    x_ptr,  # (n,)
    y_ptr,  # (n,) read before anything was written
    n,
    BLOCK: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    tl.store(y_ptr + o, tl.load(y_ptr + o, mask=m, other=0.0) + tl.load(x_ptr + o, mask=m, other=0.0), mask=m)


@triton.jit
def reverse_in_place_kernel(
    x_ptr,  # (BLOCK,): threads pass numbers through global memory with no barrier
    y_ptr,  # (BLOCK,) out
    BLOCK: tl.constexpr,
):
    o = tl.arange(0, BLOCK)
    tl.store(x_ptr + o, tl.load(x_ptr + o) + 1.0)
    tl.store(y_ptr + o, tl.load(x_ptr + (BLOCK - 1 - o)))


@triton.jit
def atomic_kernel(
    x_ptr,  # (BLOCK,)
    y_ptr,  # (1,)
    BLOCK: tl.constexpr,
):
    o = tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr + 0 * o, tl.load(x_ptr + o))
