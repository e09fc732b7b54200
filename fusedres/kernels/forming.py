"""What is formed on load: a convolution's input from what its producer wrote, and the gradient of its output."""

import triton
import triton.language as tl

from fusedres.kernels.activation import activated


@triton.jit
def widened(x, PAIRS: tl.constexpr):
    """``x`` in fp32. bf16 is its upper half: one instruction in PTX, where the compiler shifts the half down and up."""
    if PAIRS and x.dtype == tl.bfloat16:
        both: tl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
        wide = tl.inline_asm_elementwise(both, "=r,=r,r", [x], tl.float32, is_pure=True, pack=2)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def product(
    left,  # (ROWS, DEPTH)
    right,  # (DEPTH, COLUMNS)
    acc,  # (ROWS, COLUMNS) fp32 that it is added to
    PRECISION: tl.constexpr,  # of `tl.dot`
):
    """`tl.dot`; what becomes TF32 is rounded to the nearest, where tensor cores would cut digits off."""
    if PRECISION == "tf32" and left.dtype == tl.float32:
        left, right = _nearest_tf32(left), _nearest_tf32(right)
    return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def _nearest_tf32(x):
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def kept(
    x,  # 16-bit values
    keep,  # integers, that broadcast with x: all bits set, or none
):
    """``x`` or zero, in PTX: one instruction for each register of two, where the compiler chooses value by value."""
    keep = keep.to(tl.int16)
    return tl.inline_asm_elementwise("and.b32 $0, $1, $2;", "=r,r,r", [x, keep], x.dtype, is_pure=True, pack=2)


@triton.jit
def of_channels(
    ptr,  # fp32, one number for each channel
    o,
    m,
    EVEN: tl.constexpr,  # whether m is true everywhere
):
    """The numbers of channels ``o``, zero outside of ``m``."""
    numbers = tl.load(ptr + o) if EVEN else tl.load(ptr + o, mask=m, other=0.0)
    return numbers[None, :]


@triton.jit
def formed_input(
    x,  # (BLOCK_PIXELS, BLOCK_C) raw tile
    scale,  # (1, BLOCK_C) fp32
    shift,  # (1, BLOCK_C) fp32
    m_in,  # (BLOCK_PIXELS,) where there is an input, or None: everywhere
    ones_ptr,  # as in `contract`
    ACT: tl.constexpr,
    PAIRS: tl.constexpr,  # see `widened`
    BOUND: tl.constexpr,  # whether values outside are kept down before the activation where that makes them zero
):
    """u = act(x * scale + shift), rounded to the storage dtype; outside it is zero and not act(shift)."""
    u = widened(x, PAIRS) * scale + shift
    BOUNDED: tl.constexpr = BOUND and m_in is not None and not PAIRS and ACT.ends_at_zero
    if BOUNDED:
        # A bound on fp32 values is one instruction for each; choosing between 16-bit ones, as the compiler would a
        # mask, is three.
        bound = tl.where(m_in, float("inf"), 0.0)
        u = tl.minimum(u, bound[:, None], propagate_nan=tl.PropagateNan.ALL)
    u = activated(u, ACT).to(x.dtype)
    if m_in is not None and PAIRS:
        if ones_ptr is None:
            keep = tl.where(m_in, -1, 0)[:, None]
        else:
            # What is loaded under the mask is at hand in the layout of wgmma's registers. A mask computed in another
            # takes the whole operand through shared memory once more.
            keep = tl.load(ones_ptr + tl.zeros((x.shape[0], 1), tl.int32), mask=m_in[:, None], other=0)
        u = kept(u, keep)
    elif m_in is not None and not BOUNDED:
        u = tl.where(m_in[:, None], u, 0.0)
    return u


@triton.jit
def formed_gradient(
    g,  # (BLOCK_PIXELS, BLOCK_K) fp32, masked; zero where there is no dy
    y,  # (BLOCK_PIXELS, BLOCK_K) fp32 raw output; not looked at without q
    p,  # (1, BLOCK_K) fp32
    q,  # (1, BLOCK_K) fp32, or None
    r,  # (1, BLOCK_K) fp32; None together with q
    mean,  # (1, BLOCK_K) fp32, or None: zero
    inside,  # (BLOCK_PIXELS,) fp32: 1 where there is dy, 0 elsewhere; None: what is there does not matter
):
    """dy = p * g + q * (y - mean) + r, in fp32."""
    dy = g * p
    if q is not None:
        if mean is not None:
            y -= mean
        rest = y * q + r
        if inside is not None:
            # Where there is no dy its parts are not zero with r.
            rest *= inside[:, None]
        dy += rest
    return dy
