"""What the launches of kernels that pass over rows of pixels have in common."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedres.activation import Activation
from fusedres.operands import Partials
from fusedres.plan.tiles import RowTile, alignment, reduction_tile, row_tile
from fusedres.runtime.launch import launch

STORAGE = (torch.float32, torch.bfloat16, torch.float16)


def storable(*tensors: Tensor | None) -> bool:
    """Whether kernels take tensors of these dtypes: all but fp64, in which only the algebra is checked."""
    return all(tensor is None or tensor.dtype in STORAGE for tensor in tensors)


def pitch_of(tensor: Tensor) -> int | None:
    """Elements from one pixel's channels to the next's in a slice of a channels_last tensor's channels.

    None where pixels follow one another, and of any other tensor (N, C, H, W).
    """
    channels = tensor.shape[1]
    if tensor.is_contiguous(memory_format=torch.channels_last) or (channels > 1 and tensor.stride(1) != 1):
        return None
    pitch, apart = None, 1
    for dim in (3, 2, 0):
        if tensor.shape[dim] > 1:
            pitch = tensor.stride(dim) if pitch is None else pitch
            if tensor.stride(dim) != pitch * apart:
                return None
            apart *= tensor.shape[dim]
    return pitch if pitch is not None and pitch >= channels else None


def row_layout(tensor: Tensor) -> Tensor:
    """``tensor`` itself where it is channels_last or has a pitch, else a channels_last copy."""
    return tensor if pitch_of(tensor) is not None else channels_last(tensor)


def empty_rows(like: Tensor, dtype: torch.dtype | None = None, size: Sequence[int] | None = None) -> Tensor:
    """An uninitialised channels_last tensor on the device of ``like``, of its size and dtype by default."""
    return torch.empty(
        size or like.shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last
    )


def empty_mask(like: Tensor, act: Activation) -> Tensor | None:
    """An uninitialised mask of ``act`` for its output (N, C, H, W): bits, or its input, or None of the identity."""
    if act.is_identity:
        return None
    if act.needs_input:
        return empty_rows(like)
    n, c, h, w = like.shape
    if word_channels(c) == 32:
        return torch.empty((c // 32, n, h, w), dtype=torch.int32, device=like.device)
    return torch.empty((n, h, w, -(-c // 8)), dtype=torch.uint8, device=like.device)


def word_channels(channels: int) -> int:
    """Channels whose bits share a word of a mask."""
    return 32 if channels % 32 == 0 else 8


def empty_partials(parts: int, channels: int, device: torch.device) -> Partials:
    """Uninitialised statistics of as many parts."""
    mean, m2 = torch.empty((2, parts, channels), dtype=torch.float32, device=device)
    return Partials(torch.empty(parts, dtype=torch.float32, device=device), mean, m2)


def launch_rows(
    kernel: Any, over: Tensor, arguments: dict[str, Any], *, reads: Sequence[str], writes: Sequence[str], kind: str,
    flops: int = 0, partial: dict[str, int] | None = None, vectors: int = 4, all_registers: bool = False,
) -> None:  # fmt: skip
    """One pass of ``kernel`` over the pixels of ``over`` (N, C, H, W) as `row_tile` says; the rest as of `launch`."""
    rows, channels = pixels(over), over.shape[1]
    tile = row_tile(rows, channels, over.element_size(), vectors)
    blocks = tile.blocks(rows, channels)
    _launch(kernel, tile, blocks, over, arguments, reads, writes, flops, kind, partial, (), all_registers)


def launch_reduction(
    kernel: Any, over: Tensor, arguments: dict[str, Any], *, reads: Sequence[str], writes: Sequence[str], kind: str,
    flops: int = 0,
) -> None:  # fmt: skip
    """A reduction by ``kernel`` over the pixels of ``over``, cut as `reduction_parts` says."""
    rows, channels = pixels(over), over.shape[1]
    tile = reduction_tile(rows, channels)
    parts, per_part = tile.parts(rows, channels)
    arguments = {**arguments, "rows_per_part": per_part}
    steps = (per_part // tile.block_rows,)
    _launch(
        kernel, tile, parts * tile.pieces(channels), over, arguments, reads, writes, flops, kind, None, steps, False
    )


def reduction_parts(over: Tensor) -> int:
    """How many partial sums `launch_reduction` makes over this tensor."""
    rows, channels = pixels(over), over.shape[1]
    return reduction_tile(rows, channels).parts(rows, channels)[0]


def _launch(
    kernel: Any, tile: RowTile, blocks: int, over: Tensor, arguments: dict[str, Any], reads: Sequence[str],
    writes: Sequence[str], flops: int, kind: str, partial: dict[str, int] | None, steps: Sequence[int],
    all_registers: bool,
) -> None:  # fmt: skip
    pitches = [value for name, value in arguments.items() if name.endswith("_row")]
    shape = {
        "rows": pixels(over), "C": over.shape[1], "C_MULTIPLE": alignment(over.shape[1], *pitches),
        "BLOCK_ROWS": tile.block_rows, "BLOCK_C": tile.block_c,
    }  # fmt: skip
    launch(
        kernel, (blocks,), {**arguments, **shape}, reads=reads, writes=writes, partial=partial, flops=flops,
        kind=kind, steps=steps, **tile.options, all_registers=all_registers,
    )  # fmt: skip


def per_channel(vector: Tensor) -> Tensor:
    """A (C,) vector shaped to broadcast over (N, C, H, W)."""
    return vector.view(1, -1, 1, 1)


def channels_last(tensor: Tensor) -> Tensor:
    """``tensor`` (N, C, H, W) with its channels contiguous; itself when they are."""
    return tensor.contiguous(memory_format=torch.channels_last)


def pixels(tensor: Tensor) -> int:
    """Pixels per channel of an (N, C, H, W) tensor."""
    return tensor.shape[0] * tensor.shape[2] * tensor.shape[3]


def as_rows(tensor: Tensor) -> Tensor:
    """(N, C, H, W) as (N*H*W, C) rows of pixels: a view when the tensor is channels_last."""
    return tensor.permute(0, 2, 3, 1).reshape(-1, tensor.shape[1])


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """(N*H*W, C) rows as a channels_last (N, C, H, W) view, with N, H, W of ``like``."""
    n, _, h, w = like.shape
    return rows.view(n, h, w, rows.shape[1]).permute(0, 3, 1, 2)
