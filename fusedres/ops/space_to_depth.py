"""Space to depth: an image of few channels, and a weight over it, as a convolution of more channels sees them."""

import functools

import torch
from torch import Tensor
from torch.nn.functional import pad

from fusedres.operands import ConvInput, Geometry, PixelBlocks
from fusedres.ops.op import Op
from fusedres.ops.rows import channels_last, storable
from fusedres.plan.shapes import power_above
from fusedres.runtime.launch import launch, nbytes
from fusedres.runtime.torch_private import unseen_by_modes
from fusedres.runtime.tracer import lasting

# Fewer channels than an access is wide.
FEW_CHANNELS = 7
ELEMENTS = 2048  # of a tile


def blocks_of(size: tuple[int, ...], kernel: tuple[int, int], geometry: Geometry) -> PixelBlocks | None:
    """How an (N, C, H, W) is packed for a convolution; None where its channels are enough, or it steps over pixels."""
    stride, padding, dilation, groups = geometry
    steps_over = any(step > taps for step, taps in zip(stride, kernel, strict=True))
    if size[1] > FEW_CHANNELS or groups > 1 or dilation != (1, 1) or steps_over:
        return None
    return PixelBlocks((size[1], size[2], size[3]), kernel, stride, padding)


def _space_to_depth(x: Tensor, blocks: PixelBlocks, dtype: torch.dtype) -> Tensor:
    """out[n, (i bw + j) C + c, p, q] = x[n, c, p bh + i - ph, q bw + j - pw], zero outside and in further channels.

    Args:
        x: (N, C, H, W), any layout and floating-point dtype.
        blocks: bh, bw are its stride, ph, pw its padding.
        dtype: of the result.

    Returns:
        (N, *blocks.packed_size), channels_last.
    """
    c, height, width = blocks.packed_size
    return _blocks(x.to(dtype), blocks, (height, width), blocks.padding, c)


def _blocks(
    x: Tensor, blocks: PixelBlocks, size: tuple[int, int], padding: tuple[int, int], channels: int
) -> Tensor:  # fmt: skip
    """``size`` blocks of x, of so many channels each."""
    n, c, h, w = x.shape
    (bh, bw), (height, width) = blocks.stride, size
    x = pad(x, (padding[1], width * bw - w - padding[1], padding[0], height * bh - h - padding[0]))
    x = x.view(n, c, height, bh, width, bw).permute(0, 3, 5, 1, 2, 4).reshape(n, bh * bw * c, height, width)
    return channels_last(pad(x, (0, 0, 0, 0, 0, channels - bh * bw * c)))


space_to_depth = Op(_space_to_depth)


@space_to_depth.triton
def _space_to_depth_triton(x: Tensor, blocks: PixelBlocks, dtype: torch.dtype) -> Tensor:
    c, height, width = blocks.packed_size
    reach = sum((side - 1) * step for side, step in zip(x.shape[1:], x.stride()[1:], strict=True))
    if not storable(x) or max(reach, x.stride(0)) >= 2**31:
        return NotImplemented
    size = (x.shape[0], c, height, width)
    out = torch.empty(size, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    _launched(x, out, blocks, height, width * c, blocks.padding)
    return out


def _packed_weight(weight: Tensor, blocks: PixelBlocks) -> Tensor:
    """The weight that a convolution of a packed image takes.

    Args:
        weight: (K, C, R, S).
        blocks: of the image.

    Returns:
        (K, rows, 1, run): by rows of the window, taps and their channels one after the other.
    """
    k, across = len(weight), -(-blocks.window[1] // blocks.stride[1])
    packed = _blocks(weight, blocks, (blocks.rows, across), (0, 0), blocks.pitch)
    rows = packed.permute(0, 2, 3, 1).reshape(k, blocks.rows, across * blocks.pitch)
    return pad(rows, (0, blocks.run - rows.shape[2]))[:, :, None]


packed_weight = Op(_packed_weight)


@packed_weight.triton
def _packed_weight_triton(weight: Tensor, blocks: PixelBlocks) -> Tensor:
    if not storable(weight):
        return NotImplemented
    out = weight.new_empty((len(weight), blocks.rows, 1, blocks.run))
    _launched(weight, out, blocks, blocks.rows, blocks.run, (0, 0))
    return out


def _launched(x: Tensor, out: Tensor, blocks: PixelBlocks, rows: int, length: int, padding: tuple[int, int]) -> None:
    from fusedres.kernels.space_to_depth import space_to_depth_kernel

    n, c, h, w = x.shape
    strides = dict(zip(("x_n", "x_c", "x_h", "x_w"), x.stride(), strict=True))
    across, columns = -(-length // blocks.pitch), power_above(blocks.pitch)
    per_tile = max(1, min(ELEMENTS // columns, power_above(across)))
    reached = x[:, :, : rows * blocks.stride[0] - padding[0], : across * blocks.stride[1] - padding[1]]
    launch(
        space_to_depth_kernel, (n * rows * -(-across // per_tile),),
        {
            "x_ptr": x, "out_ptr": out, **strides, "H": h, "W": w, "rows": rows, "length": length,
            "pad_h": padding[0], "pad_w": padding[1], "C": c, "BLOCK_H": blocks.stride[0],
            "BLOCK_W": blocks.stride[1], "PITCH": blocks.pitch, "BLOCKS": per_tile,
            "COLUMNS": columns,
        },
        reads=("x_ptr",), kind="cast", writes=("out_ptr",), partial={"x_ptr": nbytes(reached)},
        num_warps=max(1, min(4, per_tile * columns // 512)),
    )  # fmt: skip


def depth_to_space(u: ConvInput) -> Tensor:
    """The image (N, C, H, W) of a packed one, zero where no window reaches."""
    assert u.blocks is not None
    (c, h, w), (bh, bw), (ph, pw) = u.blocks.size, u.blocks.stride, u.blocks.padding
    n, _, height, width = u.tensor.shape
    x = u.tensor[:, : u.blocks.channels].reshape(n, bh, bw, c, height, width).permute(0, 3, 4, 1, 5, 2)
    x = x.reshape(n, c, height * bh, width * bw)
    below, beside = max(0, h + ph - height * bh), max(0, w + pw - width * bw)
    return channels_last(pad(x, (0, beside, 0, below))[:, :, ph : ph + h, pw : pw + w])


def packed_sums(sums: Tensor, k: int, blocks: PixelBlocks, *, sum_dy: bool, sum_u: bool) -> Tensor:
    """A weight's gradient and sums over a packed image as they are over the image itself.

    Args:
        sums: flat, (K, rows, run) and if asked for (K,) and (rows, run).
        k: K.
        blocks: of the image.
        sum_dy, sum_u: whether the latter are there.

    Returns:
        Flat, (K, R, S, C), (K,) and (R, S, C).
    """
    return sums.index_select(0, _places(sums.device, k, blocks, sum_dy, sum_u))


@functools.lru_cache(maxsize=64)
def _places(device: torch.device, k: int, blocks: PixelBlocks, sum_dy: bool, sum_u: bool) -> Tensor:
    """Where the elements that `packed_sums` gives are among those that it is given."""
    size, (bh, bw), c = blocks.rows * blocks.run, blocks.stride, blocks.size[0]
    with unseen_by_modes():  # made once, they are part of no pass
        r, s, o_c = (torch.arange(length, device=device) for length in (*blocks.window, c))
        rows = r // bh * blocks.run + r % bh * bw * c
        columns = s // bw * blocks.pitch + s % bw * c
        window = (rows[:, None, None] + columns[:, None] + o_c).flatten()
        filters = (torch.arange(k, device=device)[:, None] * size + window).flatten()
        beside = torch.arange(k * sum_dy, device=device) + k * size
        below = window[: len(window) * sum_u] + (k * size + k * sum_dy)
        return lasting(torch.cat([filters, beside, below]))
