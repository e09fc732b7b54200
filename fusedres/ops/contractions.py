"""What the launches of forward convolutions have in common: whether there is a kernel, its tile, its arguments."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres.compiler.targets import Target
from fusedres.operands import ConvInput, Geometry, Layer, PixelBlocks
from fusedres.ops.device import device_activation
from fusedres.ops.rows import channels_last, pitch_of, row_layout, storable
from fusedres.ops.space_to_depth import blocks_of, packed_weight, space_to_depth
from fusedres.plan.conv_tiles import ConvTile, conv_tile, packs_pixels
from fusedres.plan.shapes import ConvVariant, depthwise, narrow_waves, wide
from fusedres.plan.tiles import alignment
from fusedres.runtime import backends
from fusedres.runtime.launch import multiplies_in_tf32, target_of
from fusedres.runtime.tracer import lasting

LARGEST_OFFSET = 2**31
LARGEST_WINDOW = 31  # taps along a side, a bit each


class ConvLaunch(NamedTuple):
    """A convolution that a kernel is launched for."""

    shape: ConvVariant
    tile: ConvTile
    size: tuple[int, int, int, int]  # (N, K, P, Q) of the output
    arguments: dict[str, Any]
    read: int  # bytes of the input that lie in some window
    flops: int

    @property
    def blocks(self) -> int:
        return self.tile.tiles(self.shape) * self.tile.pieces(self.shape)


def why_no_kernel(u: ConvInput, weight: Tensor, geometry: Geometry) -> str | None:
    """Why a convolution runs on the library and not on our kernels, or None."""
    shape = conv_shape(u, weight, geometry)
    if not storable(u.tensor, weight):
        return f"{u.tensor.dtype} has no kernels"
    if depthwise(shape):
        return "depthwise: too few channels of a group for tensor cores"
    if left_to_library(u, shape, (weight.shape[2], weight.shape[3]), geometry):
        return "few channels, of which the library is thought to make more"
    if max(shape.r, shape.s) > LARGEST_WINDOW:
        return f"a window of {shape.r} x {shape.s} pixels: kernels take at most {LARGEST_WINDOW}"
    row = u.tensor.shape[3] * (pitch_of(u.tensor) or u.tensor.shape[1])
    if shape.r * geometry.dilation[0] * row >= LARGEST_OFFSET:
        return "a window of more than 2**31 values"
    return None


def conv_shape(u: ConvInput, weight: Tensor, geometry: Geometry) -> ConvVariant:
    """What tiles depend on."""
    n, _, h, w = u.size
    k, _, r, s = weight.shape
    p, q = geometry.output_size(h, w, (r, s))
    return shape_of(u, n * p * q, k, (r, s), geometry)


def shape_of(u: ConvInput, pixels: int, k: int, kernel: tuple[int, int], geometry: Geometry) -> ConvVariant:
    """The same from the output's pixels and channels and the window; of few channels, as they are packed."""
    groups, itemsize = geometry.groups, u.tensor.element_size()
    blocks = packed_as(u, kernel, geometry)
    if blocks is not None:
        return ConvVariant(pixels, blocks.run, k, 1, blocks.rows, 1, itemsize)
    c = u.tensor.shape[1] // groups
    return ConvVariant(pixels, c, k // groups, groups, *kernel, itemsize, u.scale is not None)


def packed_as(u: ConvInput, kernel: tuple[int, int], geometry: Geometry) -> PixelBlocks | None:
    """How the input of a kernel is packed, or will be."""
    if u.blocks is not None or u.scale is not None or pitch_of(u.tensor) is not None:
        return u.blocks
    return blocks_of(tuple(u.tensor.shape), kernel, geometry)


def left_to_library(u: ConvInput, shape: ConvVariant, kernel: tuple[int, int], geometry: Geometry) -> bool:
    """Whether a convolution of an image that would have to be packed is the library's, where there is one."""
    if not backends.runs_native() or u.blocks is not None or packed_as(u, kernel, geometry) is None:
        return False
    return not packs_pixels(shape, target_of(u.tensor))


def conv_input(x: Tensor, dtype: torch.dtype, layer: Layer, *, pack: bool) -> ConvInput:
    """What a layer consumes, x (N, C, H, W) in a dtype of contractions; ``pack``: whether x may be packed for it."""
    if pack:
        u, geometry = ConvInput(x), layer.geometry
        blocks = packed_as(u, layer.window, geometry)
        if blocks is not None:
            shape = conv_shape(u, layer.weight, geometry)._replace(itemsize=dtype.itemsize)
            if not left_to_library(u, shape, layer.window, geometry):
                return ConvInput(space_to_depth(x, blocks, dtype), blocks=blocks)
    return ConvInput(channels_last(x).to(dtype))


class Operand(NamedTuple):
    """A convolution's input as a kernel goes through it.

    ``x`` (N, C, H, W) has ``row`` elements from one pixel to the next, or None: C. ``geometry`` is that over x, and
    ``read`` the bytes of it that lie in some window.
    """

    x: Tensor
    row: int | None
    geometry: Geometry
    size: tuple[int, int]  # (P, Q)
    read: int
    blocks: PixelBlocks | None


def operand_of(u: ConvInput, kernel: tuple[int, int], geometry: Geometry) -> Operand:
    """The input of a convolution, packed now where it has few channels and was not."""
    blocks = packed_as(u, kernel, geometry)
    if blocks is None:
        x = row_layout(u.tensor)
        size = geometry.output_size(x.shape[2], x.shape[3], kernel)
        return Operand(x, pitch_of(x), geometry, size, bytes_in_windows(x, size, kernel, geometry), None)
    x = u.tensor if u.blocks is not None else space_to_depth(u.tensor, blocks, u.tensor.dtype)
    n, _, height, _ = x.shape
    row = (blocks.output_size[1] - 1) * blocks.pitch + blocks.run
    read = n * height * row * x.element_size()
    return Operand(x, blocks.pitch, Geometry(), blocks.output_size, read, blocks)


def window_arguments(
    x: Tensor, shape: ConvVariant, size: tuple[int, int], geometry: Geometry, *, c_rows: Sequence[int | None] = (),
    k_rows: Sequence[int | None] = (),
) -> dict[str, Any]:  # fmt: skip
    """What every kernel that goes through windows of ``x`` (N, C, H, W) is told of them; ``size`` is (P, Q).

    ``c_rows`` and ``k_rows`` are the pitches of the tensors of C and of K channels.
    """
    stride, padding, dilation, groups = geometry
    return {
        "pixels": shape.pixels, "groups": groups, "C": shape.c, "K": shape.k, "H": x.shape[2], "W": x.shape[3],
        "P": size[0], "Q": size[1], "stride_h": stride[0], "stride_w": stride[1], "pad_h": padding[0],
        "pad_w": padding[1], "dilation_h": dilation[0], "dilation_w": dilation[1], "R": shape.r, "S": shape.s,
        "TF32": multiplies_in_tf32(x), "C_MULTIPLE": alignment(shape.c, *c_rows),
        "K_MULTIPLE": alignment(shape.k, *k_rows),
    }  # fmt: skip


def conv_launch(
    u: ConvInput, weight: Tensor, geometry: Geometry, *, second: bool = False, epilogue_bytes: int = 0,
    y_row: int | None = None,
) -> ConvLaunch:  # fmt: skip
    """The convolution as both kernels are told of it.

    ``second`` and ``epilogue_bytes`` are those of `ConvVariant`, ``y_row`` the pitch of the output.
    """
    shape = conv_shape(u, weight, geometry)._replace(second=second, epilogue_bytes=epilogue_bytes)
    operand = operand_of(u, (weight.shape[2], weight.shape[3]), geometry)
    x, x_row, size, groups = operand.x, operand.row, operand.size, geometry.groups
    flops = 2 * shape.pixels * weight.numel()
    weight = channels_last(weight) if operand.blocks is None else packed_weight(weight, operand.blocks)
    target = target_of(x)
    tile = conv_tile(shape, target)
    padded, pairs = operand.geometry.padding != (0, 0), in_pairs(weight, target)
    ones = _ones(x.device) if pairs and padded and shape.prologue and wide(target) else None
    arguments = {
        "x_ptr": x, "w_ptr": weight, "x_scale_ptr": u.scale, "x_shift_ptr": u.shift, "ones_ptr": ones,
        "X_ACT": device_activation(u.act, u.scale),
        "x_row": x_row, **window_arguments(x, shape, size, operand.geometry, c_rows=[x_row], k_rows=[y_row]),
        "PADDED": padded, "SAME": operand.blocks is None and keeps_pixels(x, size, geometry), "PAIRS": pairs,
        "APART": columns_apart(weight, target),
        "GROUPS_PER_TILE": tile.groups_per_tile,
        "EVEN_C": groups % tile.groups_per_tile == 0 and tile.groups_per_tile * shape.c % tile.block_c == 0,
        "BLOCK_PIXELS": tile.block_pixels, "BLOCK_K": tile.block_k, "BLOCK_C": tile.block_c,
    }  # fmt: skip
    return ConvLaunch(shape, tile, (len(x), shape.k * groups, *size), arguments, operand.read, flops)


def keeps_pixels(x: Tensor, size: tuple[int, int], geometry: Geometry) -> bool:
    """Whether ``x`` (N, C, H, W) has the output's (P, Q) pixels: stride 1, and as many of them."""
    return geometry.stride == (1, 1) and size == tuple(x.shape[2:])


def in_pairs(operand: Tensor, target: Target) -> bool:
    """Whether kernels work on the 16-bit values of an operand two to a register, in PTX."""
    return target.backend == "cuda" and operand.element_size() == 2


def columns_apart(operand: Tensor, target: Target) -> bool:
    """Whether matrix units leave neighbouring columns of a product of such operands in different threads."""
    return narrow_waves(target) and operand.element_size() == 2


@functools.cache
def _ones(device: torch.device) -> Tensor:
    """All bits of an int32 set, on a device for good."""
    return lasting(torch.full((1,), -1, dtype=torch.int32, device=device))


def bytes_in_windows(x: Tensor, size: tuple[int, ...], window: tuple[int, int], geometry: Geometry) -> int:
    """Bytes of ``x`` (N, C, H, W) that lie in one of the (P, Q) windows."""
    covered = x.shape[0] * x.shape[1] * x.element_size()
    steps = geometry.stride, geometry.padding, geometry.dilation
    for side, windows, kernel, *step in zip(x.shape[2:], size, window, *steps, strict=True):
        covered *= touched(side, windows, kernel, *step)
    return covered


@functools.cache
def touched(side: int, windows: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """How many of ``side`` pixels lie in one of the windows."""
    places = (i * stride - padding + j * dilation for i in range(windows) for j in range(kernel))
    return len({place for place in places if 0 <= place < side})
