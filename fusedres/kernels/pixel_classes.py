"""The classes of a strided convolution's input pixels, which are alike in row and column modulo the stride."""

import triton
import triton.language as tl


@triton.jit
def first_tap(
    remainder,  # of the class's pixels along this side
    pad,
    dilation,
    stride,
    WINDOW: tl.constexpr,
):
    """The first tap that reaches pixels of a class, WINDOW where none does."""
    first = WINDOW
    for i in tl.static_range(WINDOW):
        tap = WINDOW - 1 - i
        first = tl.where((remainder + pad - tap * dilation) % stride == 0, tap, first)
    return first


@triton.jit
def pixels_of(
    o_pixel,  # (BLOCK_PIXELS,) pixels, counted inside of their class
    count,  # that the class has
    class_h,  # row and column of its first pixel
    class_w,
    high,  # its rows and columns
    wide,
    stride_h,
    stride_w,
    STRIDED: tl.constexpr,
):
    """The same, those beyond the class as its last one, and their images, rows and columns.

    So there is no mask in the loop, and nobody stores what they give.
    """
    o_pixel = tl.minimum(o_pixel, count - 1)
    if STRIDED:
        o_pixel = tl.maximum(o_pixel, 0)  # a class may be empty
    o_n, o_h, o_w = o_pixel // (high * wide), o_pixel // wide % high, o_pixel % wide
    if STRIDED:
        o_h, o_w = class_h + o_h * stride_h, class_w + o_w * stride_w
    return o_pixel, o_n, o_h, o_w
