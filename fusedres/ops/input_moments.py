"""The moments of a 1x1 convolution's input: all that batch norm needs to know of an output that is never written."""

from typing import NamedTuple

import torch
from torch import Tensor

from fusedres.operands import ConvInput, Geometry, Moments, Norm, Normaliser, Partials, statistics_dtype
from fusedres.ops import onednn
from fusedres.ops.bn_finalize import bn_finalize, check_norm, finalisable, normaliser_outputs
from fusedres.ops.checks import check_activation
from fusedres.ops.contractions import columns_apart, in_pairs
from fusedres.ops.conv_forward import conv_operand
from fusedres.ops.conv_weight_grad import weight_grad
from fusedres.ops.device import device_activation
from fusedres.ops.op import Op
from fusedres.ops.rows import as_rows, channels_last, per_channel, pixels, storable
from fusedres.plan.tiles import MomentsTile, PartialTile, alignment, gram_tile, moments_tile, weight_precision
from fusedres.runtime.launch import launch, target_of

# Rows are taken in pieces of 1 MiB of fp32, which stay in a core's second-level cache between the passes over them.
_PIECE = 1 << 18


def sampled(u: ConvInput, stride: tuple[int, int]) -> ConvInput:
    """The pixels that a 1x1 convolution of this stride looks at (a view)."""
    return u if stride == (1, 1) else u._replace(tensor=u.tensor[:, :, :: stride[0], :: stride[1]])


def _check(u: ConvInput, stride: tuple[int, int] = (1, 1)) -> None:
    check_activation("u", u.tensor)


def _input_moments(u: ConvInput, stride: tuple[int, int] = (1, 1)) -> Moments:
    """mean = sum(u) / n and m2 = sum((u - mean)(u - mean)^T) over the n pixels that a 1x1 convolution reads.

    Both are accumulated about a reference row (the mean of the first piece), so that a mean that is large against
    the deviation does not cancel: with t = u - row,  mean = row + sum(t) / n,  m2 = sum(t t^T) - sum(t) sum(t)^T / n.

    Args:
        u: (N, C, H, W), formed on load if it has a scale.
        stride: of the 1x1 convolution.

    Returns:
        `Moments` in the statistics dtype: n, (C,), (C, C).
    """
    tensor, scale, shift, act, _ = sampled(u, stride)
    rows = as_rows(tensor)
    n, channels = rows.shape
    dtype = statistics_dtype(rows.dtype)

    def piece(part: Tensor) -> Tensor:
        return conv_operand(ConvInput(part[:, :, None, None], scale, shift, act)).flatten(1).to(dtype)

    parts = rows.split(max(1, _PIECE // channels))
    row = piece(parts[0]).mean(0)
    total = torch.zeros_like(row)
    gram = torch.zeros((channels, channels), dtype=dtype, device=rows.device)
    for part in parts:
        t = piece(part) - row
        total += t.sum(0)
        gram.addmm_(t.t(), t)
    return Moments(n, row + total / n, gram - torch.outer(total, total / n))


input_moments = Op(_input_moments, check=_check)


@input_moments.triton
def _input_moments_triton(u: ConvInput, stride: tuple[int, int] = (1, 1)) -> Moments:
    return _summed(_launched(u, stride)).moments if storable(u.tensor) else NotImplemented


class _Parts(NamedTuple):
    """What `input_moments_kernel` leaves, and its tile."""

    pixels: int
    row: Tensor
    sums: Tensor
    gram: Tensor
    tile: MomentsTile


def _launched(u: ConvInput, stride: tuple[int, int]) -> _Parts:
    from fusedres.kernels.input_moments import input_moments_kernel

    x = channels_last(u.tensor)
    n, channels, h, w = x.shape
    p, q = Geometry(stride).output_size(h, w, (1, 1))
    count = n * p * q
    target = target_of(x)
    tile = moments_tile(count, channels, x.element_size(), target)
    pairs = tile.pairs(channels)
    row = torch.empty(channels, dtype=torch.float32, device=x.device)
    sums = torch.empty((tile.parts, channels), dtype=torch.float32, device=x.device)
    gram = torch.empty((tile.parts, pairs, tile.block_c, tile.block_c), dtype=torch.float32, device=x.device)
    read = {"x_ptr": x, "scale_ptr": u.scale, "shift_ptr": u.shift}
    written = {"row_ptr": row, "sum_ptr": sums, "gram_ptr": gram}
    launch(
        input_moments_kernel, (tile.parts * pairs,),
        {
            **read, **written, "pixels": count, "pixels_per_part": tile.per_part(count), "C": channels, "H": h, "W": w,
            "P": p, "Q": q, "stride_h": stride[0], "stride_w": stride[1],
            "STRIDED": stride != (1, 1), "EVEN_PIXELS": count % tile.block_pixels == 0,
            "EVEN_C": channels % tile.block_c == 0,
            "ACT": device_activation(u.act, u.scale), "PAIRS": in_pairs(x, target), "APART": columns_apart(x, target),
            "C_MULTIPLE": alignment(channels), "BLOCK_PIXELS": tile.block_pixels, "BLOCK_C": tile.block_c,
        },
        reads=tuple(read), kind="moments", writes=tuple(written),
        partial={"x_ptr": count * channels * x.element_size()},
        flops=count * channels * (channels + 1), steps=(0, tile.steps(count)), **tile.options,
    )  # fmt: skip
    return _Parts(count, row, sums, gram, tile)


class _Summed(NamedTuple):
    """The moments, and where a weight was given its output's mean and m2 in parts (parts, K)."""

    moments: Moments
    mean: Tensor | None
    m2: Tensor | None


def _summed(parts: _Parts, weight: Tensor | None = None) -> _Summed:
    """The kernel that adds the parts, for the output of a convolution with ``weight`` (K, C) in rows."""
    from fusedres.kernels.input_moments import input_moments_finish_kernel

    side, pairs, (count, channels) = parts.tile.block_c, parts.gram.shape[1], parts.sums.shape
    device = parts.row.device
    k = 1 if weight is None else len(weight)
    precision = None if weight is None else weight_precision(target_of(weight), weight.dtype)
    tile = gram_tile(pairs, side, count, k, precision)
    cuts = side // tile.block_c
    mean = torch.empty(channels, dtype=torch.float32, device=device)
    m2 = torch.empty((channels, channels), dtype=torch.float32, device=device)
    y_mean = y_m2 = None
    if weight is not None:
        y_mean = torch.empty((-(-channels // side) * cuts, k), dtype=torch.float32, device=device)
        y_m2 = torch.empty((pairs * cuts**2, k), dtype=torch.float32, device=device)
    read = {"row_ptr": parts.row, "sum_ptr": parts.sums, "gram_ptr": parts.gram, "w_ptr": weight}
    written = {"mean_ptr": mean, "m2_ptr": m2, "part_mean_ptr": y_mean, "part_m2_ptr": y_m2}
    flops = parts.gram.numel() + (0 if weight is None else k * channels * (channels + 4))
    launch(
        input_moments_finish_kernel, (pairs * cuts**2, tile.k_pieces),
        {
            **read, **written, "parts": count, "pixels": parts.pixels, "k_pieces": tile.k_pieces, "C": channels, "K": k,
            "PRECISION": precision, "SIDE": side, "BLOCK_PARTS": tile.block_parts, "BLOCK_C": tile.block_c,
            "BLOCK_K": tile.block_k,
        },
        reads=tuple(read), kind="moments", writes=tuple(written), flops=flops,
        steps=(0, -(-count // tile.block_parts), 0 if weight is None else tile.steps(k)), **tile.options,
    )  # fmt: skip
    return _Summed(Moments(parts.pixels, mean, m2), y_mean, y_m2)


@input_moments.native
def _input_moments_native(u: ConvInput, stride: tuple[int, int] = (1, 1)) -> Moments:
    if not onednn.runs(u.tensor):
        return NotImplemented
    seen = channels_last(conv_operand(sampled(u, stride)))
    n = pixels(seen)
    row = torch.ops.aten.batch_norm_update_stats(seen, None, None, 0.0)[0]
    t = seen - per_channel(row)
    rest = as_rows(t).sum(0)  # what the rounding of ``row`` left
    gram = weight_grad(t, t, (1, 1), Geometry()).flatten(1)
    return Moments(n, row + rest / n, gram - torch.outer(rest, rest / n))


def moments_statistics(moments: Moments, weight: Tensor) -> Partials:
    """The statistics of y = W u from the moments of u: mean = W mean_u, m2 = rowsum((W m2_u) * W), never negative.

    Args:
        moments: of the input, (C,) and (C, C).
        weight: (K, C, 1, 1), the rounded one that the contraction uses.

    Returns:
        `Partials` with T = 1.
    """
    w = weight.flatten(1).to(moments.mean.dtype)
    m2 = ((w @ moments.m2) * w).sum(1).clamp_min(0)
    count = torch.full((1,), moments.pixels, dtype=m2.dtype, device=m2.device)
    return Partials(count, (w @ moments.mean).unsqueeze(0), m2.unsqueeze(0))


def _check_measured(u: ConvInput, weight: Tensor, norm: Norm, stride: tuple[int, int] = (1, 1)) -> None:
    check_activation("u", u.tensor)
    check_norm(weight.shape[0], norm)


def _measured_input(
    u: ConvInput, weight: Tensor, norm: Norm, stride: tuple[int, int] = (1, 1)
) -> tuple[Moments, Normaliser]:
    """`input_moments`, and `bn_finalize` of the `moments_statistics` that follow; the arguments are theirs."""
    moments = input_moments(u, stride)
    return moments, bn_finalize(moments_statistics(moments, weight), norm)


measured_input = Op(_measured_input, check=_check_measured)


@measured_input.triton
def _measured_input_triton(
    u: ConvInput, weight: Tensor, norm: Norm, stride: tuple[int, int] = (1, 1)
) -> tuple[Moments, Normaliser]:
    k, c = weight.shape[:2]
    # The statistics of y are K values, the moments of u C * C: those are what processes tell each other.
    if norm.numbers.is_shared or not storable(weight, u.tensor) or not finalisable(norm):
        return NotImplemented
    from fusedres.kernels.moments import moments_finalize_kernel

    moments, mean, m2 = _summed(_launched(u, stride), channels_last(weight).view(k, c))
    assert mean is not None and m2 is not None
    tile, read = PartialTile(), {"part_mean_ptr": mean, "part_m2_ptr": m2}
    outputs = normaliser_outputs(norm, k, weight.device)
    launch(
        moments_finalize_kernel, (-(-k // tile.block_c),),
        {
            **read, **outputs.arguments, "pixels": moments.pixels, "mean_parts": len(mean), "m2_parts": len(m2), "K": k,
            "BLOCK_PARTS": tile.block_parts, "BLOCK_K": tile.block_c,
        },
        reads=(*read, *outputs.reads), kind="moments", writes=outputs.writes, flops=mean.numel() + m2.numel(),
        steps=[-(-len(parts) // tile.block_parts) for parts in (mean, m2)], **tile.options,
    )  # fmt: skip
    return moments, outputs.norm
