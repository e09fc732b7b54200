"""The moments of a 1x1 convolution's input: all that batch norm needs to know of an output that is never written."""

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
from fusedres.plan.tiles import alignment, matrix_tile, moments_tile
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
    tensor, scale, shift, act = sampled(u, stride)
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
    if not storable(u.tensor):
        return NotImplemented
    from fusedres.kernels.input_moments import input_moments_finish_kernel, input_moments_kernel

    x = channels_last(u.tensor)
    n, channels, h, w = x.shape
    p, q = Geometry(stride).output_size(h, w, (1, 1))
    count = n * p * q
    target = target_of(x)
    tile = moments_tile(count, channels, x.element_size(), target)
    pairs = tile.pairs(channels)
    row, mean = torch.empty((2, channels), dtype=torch.float32, device=x.device)
    sums = torch.empty((tile.parts, channels), dtype=torch.float32, device=x.device)
    gram = torch.empty((tile.parts, pairs, tile.block_c, tile.block_c), dtype=torch.float32, device=x.device)
    m2 = torch.empty((channels, channels), dtype=torch.float32, device=x.device)
    read = {"x_ptr": x, "scale_ptr": u.scale, "shift_ptr": u.shift}
    partial = {"row_ptr": row, "sum_ptr": sums, "gram_ptr": gram}
    launch(
        input_moments_kernel, (tile.parts * pairs,),
        {
            **read, **partial, "pixels": count, "pixels_per_part": tile.per_part(count), "C": channels, "H": h, "W": w,
            "P": p, "Q": q, "stride_h": stride[0], "stride_w": stride[1],
            "STRIDED": stride != (1, 1), "EVEN_PIXELS": count % tile.block_pixels == 0,
            "EVEN_C": channels % tile.block_c == 0,
            "ACT": device_activation(u.act, u.scale), "PAIRS": in_pairs(x, target), "APART": columns_apart(x, target),
            "C_MULTIPLE": alignment(channels), "BLOCK_PIXELS": tile.block_pixels, "BLOCK_C": tile.block_c,
        },
        reads=tuple(read), kind="moments", writes=tuple(partial),
        partial={"x_ptr": count * channels * x.element_size()},
        flops=count * channels * (channels + 1), **tile.options,
    )  # fmt: skip
    rows = min(16, tile.block_c)
    launch(
        input_moments_finish_kernel, (pairs, tile.block_c // rows),
        {
            **partial, "mean_ptr": mean, "m2_ptr": m2, "parts": tile.parts, "pixels": count, "C": channels,
            "BLOCK_C": tile.block_c, "ROWS": rows,
        },
        reads=tuple(partial),
        kind="moments", writes=("mean_ptr", "m2_ptr"), flops=gram.numel(), num_warps=tile.num_warps,
    )  # fmt: skip
    return Moments(count, mean, m2)


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


def _check_norm(moments: Moments, weight: Tensor, norm: Norm) -> None:
    check_norm(weight.shape[0], norm)


def _moments_finalize(
    moments: Moments,
    weight: Tensor,
    norm: Norm,
) -> Normaliser:
    """`bn_finalize` of `moments_statistics`; the arguments are theirs."""
    return bn_finalize(moments_statistics(moments, weight), norm)


moments_finalize = Op(_moments_finalize, check=_check_norm)


@moments_finalize.triton
def _moments_finalize_triton(
    moments: Moments,
    weight: Tensor,
    norm: Norm,
) -> Normaliser:
    k, c = weight.shape[:2]
    if not storable(weight, moments.mean) or not finalisable(norm):
        return NotImplemented
    from fusedres.kernels.moments import moments_finalize_kernel

    tile = matrix_tile(target_of(weight))
    read = {
        "input_mean_ptr": moments.mean, "input_m2_ptr": moments.m2, "w_ptr": channels_last(weight).view(k, c),
    }  # fmt: skip
    outputs = normaliser_outputs(norm, k, weight.device)
    launch(
        moments_finalize_kernel, (-(-k // tile.block_k),),
        {
            **read, **outputs.arguments, "pixels": moments.pixels, "C": c, "K": k, "PRECISION": tile.precision,
            "BLOCK_K": tile.block_k, "BLOCK_C": tile.block_c,
        },
        reads=(*read, *outputs.reads), kind="moments", writes=outputs.writes, flops=2 * k * c * (c + 2), **tile.options,
    )  # fmt: skip
    return outputs.norm
