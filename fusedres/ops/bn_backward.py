"""The backward pass of batch norm: its two sums, the coefficients they make, and the gradient they give."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres.operands import Normaliser, OutputGrad, statistics_dtype
from fusedres.ops.act_mask import act_backward, gradient, is_bits, mask_arguments
from fusedres.ops.op import Op
from fusedres.ops.rows import (
    channels_last,
    empty_rows,
    launch_reduction,
    launch_rows,
    per_channel,
    pitch_of,
    pixels,
    reduction_parts,
    row_layout,
    storable,
)
from fusedres.ops.zero_pad_shortcut import Added, ZeroPaddedGrad, added_geometry, added_read, zero_pad_shortcut_grad
from fusedres.plan.tiles import AddedTile, partial_tile
from fusedres.runtime.collectives import gathered
from fusedres.runtime.launch import launch


def masked_gradient(dy: OutputGrad) -> Tensor:
    """The gradient behind the activation, without p, q, r."""
    if dy.mask is None or dy.act.is_identity:
        return dy.g
    return act_backward(dy.g, dy.mask, dy.act, scratch=dy.scratch)


def added_gradient(add: Added) -> Tensor:
    """A gradient from elsewhere, masked, as a tensor of the input's size."""
    if isinstance(add, ZeroPaddedGrad):
        return zero_pad_shortcut_grad(masked_gradient(add.grad), add.size, add.stride)
    return masked_gradient(add)


class NormSums(NamedTuple):
    """What the backward pass of batch norm needs to know of all pixels, each (K,) in the statistics dtype.

    ``sum_g`` and ``sum_gy``: sum(g) and sum(g * y_hat), the gradients of beta and gamma; of this process's pixels,
    whoever shares the statistics. ``q`` and ``r``: of dy = p * g + q * (y - mean) + r under batch statistics, by
    `bn_backward_coefficients`.
    """

    sum_g: Tensor
    sum_gy: Tensor
    q: Tensor
    r: Tensor


def _bn_backward_reduce(g: OutputGrad, y: Tensor, norm: Normaliser) -> NormSums:
    """sum(g) and sum(g * y_hat) over the pixels, with y_hat = (y - mean) * invstd, and q and r from them.

    Args:
        g: (N, K, P, Q), masked on load.
        y: (N, K, P, Q) raw convolution output.
        norm: the `Normaliser` of the forward pass.

    Returns:
        `NormSums`.
    """
    dtype = norm.mean.dtype
    grad = masked_gradient(g).to(dtype)
    normalised = (y.to(dtype) - per_channel(norm.mean)) * per_channel(norm.invstd)
    sum_g, sum_gy = grad.sum((0, 2, 3)), (grad * normalised).sum((0, 2, 3))
    return NormSums(sum_g, sum_gy, *bn_backward_coefficients(sum_g, sum_gy, pixels(y), norm))


bn_backward_reduce = Op(_bn_backward_reduce)


@bn_backward_reduce.triton
def _bn_backward_reduce_triton(g: OutputGrad, y: Tensor, norm: Normaliser) -> NormSums:
    if not storable(g.g, y):
        return NotImplemented
    from fusedres.kernels.bn_backward import bn_backward_reduce_kernel

    sums, products = torch.empty((2, reduction_parts(y), y.shape[1]), dtype=torch.float32, device=y.device)
    arguments = {
        **gradient(g.g), **mask_arguments(g), "y_ptr": channels_last(y), "mean_ptr": norm.mean,
        "part_g_ptr": sums, "part_gd_ptr": products,
    }  # fmt: skip
    launch_reduction(
        bn_backward_reduce_kernel, y, arguments, reads=("g_ptr", "mask_ptr", "y_ptr", "mean_ptr"),
        kind="batch norm", writes=("part_g_ptr", "part_gd_ptr"), flops=(4 + (g.mask is not None)) * y.numel(),
    )  # fmt: skip
    return finished(sums, products, pixels(y), norm).sums


class Finished(NamedTuple):
    """Batch norm's sums, and the sum (size,) of a weight's gradient in parts where one was given."""

    sums: NormSums
    weight: Tensor | None = None


def finished(
    sums: Tensor, products: Tensor, count: int, norm: Normaliser, weight_parts: Tensor | None = None
) -> Finished:
    """From (parts, K) partial sums of g and of g * (y - mean) over ``count`` pixels, by one launch.

    ``weight_parts``: (parts, size), added up by programs beside them.
    """
    from fusedres.kernels.bn_backward import bn_backward_finish_kernel

    parts, channels = sums.shape
    tile, columns_tile = AddedTile(), partial_tile(parts)
    results = NormSums(*torch.empty((4, channels), dtype=torch.float32, device=sums.device))
    weight, others, size = None, 0, 1
    if weight_parts is not None:
        size = weight_parts.shape[1]
        weight, others = weight_parts.new_empty(size, dtype=torch.float32), -(-size // tile.block)
    read = {
        "part_g_ptr": sums, "part_gd_ptr": products, "invstd_ptr": norm.invstd, "scale_ptr": norm.scale,
        "part_weight_ptr": weight_parts,
    }  # fmt: skip
    written = {**{f"{name}_ptr": tensor for name, tensor in results._asdict().items()}, "weight_ptr": weight}
    columns = -(-channels // columns_tile.block_c)
    steps = [-(-parts // columns_tile.block_parts) * columns / (columns + others)] * 2
    if weight_parts is not None:
        steps.append(-(-len(weight_parts) // tile.block_parts) * others / (columns + others))
    launch(
        bn_backward_finish_kernel, (columns + others,),
        {
            **read, **written, "parts": parts, "rows": count, "C": channels,
            "weight_parts": 1 if weight_parts is None else len(weight_parts), "weight_size": size,
            "BLOCK_PARTS": columns_tile.block_parts, "BLOCK_C": columns_tile.block_c,
            "WEIGHT_PARTS": tile.block_parts, "WEIGHT_BLOCK": tile.block,
        },
        reads=tuple(read), kind="batch norm", writes=tuple(written),
        flops=2 * parts * channels + (0 if weight_parts is None else weight_parts.numel()),
        steps=steps, **columns_tile.options,
    )  # fmt: skip
    return Finished(of_group([results], [norm])[0], weight)


def of_group(sums: Sequence[NormSums], norms: Sequence[Normaliser]) -> list[NormSums]:
    """Sums of this process's pixels, with q and r by those of all that share the statistics of these batch norms, which
    are one group for all of them, by one collective; of no group, as they are."""
    if norms[0].shared is None:
        return list(sums)
    every = _shared_coefficients([(each.sum_g, each.sum_gy) for each in sums], norms)
    return [each._replace(q=q, r=r) for each, (q, r) in zip(sums, every, strict=True)]


def bn_backward_coefficients(sum_g: Tensor, sum_gy: Tensor, count: int, norm: Normaliser) -> tuple[Tensor, Tensor]:
    """q and r (K,) of dy = p * g + q * (y - mean) + r, from batch norm's two sums over ``count`` pixels.

    Where the statistics are of several processes, so are these two sums and the count, by one collective.

    With a = scale, m1 = sum_g / count, m2 = sum_gy / count:  dy = a * (g - m1 - y_hat * m2), so
    p = a,  q = -a * m2 * invstd,  r = -a * m1.
    """
    if norm.shared is None:
        return _coefficients(sum_g, sum_gy, count, norm)
    return _shared_coefficients([(sum_g, sum_gy)], [norm])[0]


def _coefficients(sum_g: Tensor, sum_gy: Tensor, count: int | Tensor, norm: Normaliser) -> tuple[Tensor, Tensor]:
    return -norm.scale * norm.invstd * sum_gy / count, -norm.scale * sum_g / count


def _shared_coefficients(
    sums: Sequence[tuple[Tensor, Tensor]], norms: Sequence[Normaliser]
) -> list[tuple[Tensor, Tensor]]:
    shared = [norm.shared for norm in norms if norm.shared is not None]
    own = [vector for pair in sums for vector in pair]
    packed = torch.cat(own)
    every = gathered(torch.zeros_like(packed) if shared[0].absent else packed, shared[0].group)
    vectors = every.sum(0).split([len(vector) for vector in own])
    total = zip(vectors[::2], vectors[1::2], shared, norms, strict=True)
    return [_coefficients(sum_g, sum_gy, of_all.pixels, norm) for sum_g, sum_gy, of_all, norm in total]


def bias_grad(sum_g: Tensor, norm: Normaliser, *, batch_stats: bool) -> Tensor:
    """The gradient (K,) of a bias before a batch norm, from sum(g); before batch statistics it changes nothing."""
    return torch.zeros_like(sum_g) if batch_stats else norm.scale * sum_g


def output_grad(g: OutputGrad, sums: NormSums | None, y: Tensor, norm: Normaliser) -> OutputGrad:
    """dy behind a batch norm, in parts; ``sums`` is None where its statistics are frozen, so that q and r are zero."""
    if sums is None:
        return g._replace(p=norm.scale)
    return g._replace(y=y, p=norm.scale, q=sums.q, r=sums.r, mean=norm.mean)


def _bn_backward_apply(dy: OutputGrad, *, add: Added | None = None) -> Tensor:
    """dy = p * g + q * (y - mean) + r, plus the masked ``add``, written to memory.

    Args:
        dy: its parts; ``q``, ``r`` may be None (zero), as may ``p`` (the masked g itself). ``g`` and ``y`` are read
            where they are if they are slices of wider rows (`pitch_of`).
        add: a gradient of the same tensor from elsewhere (the shortcut), without p, q, r, or what a zero-pad shortcut
            makes of one, or None.

    Returns:
        (N, K, P, Q) in the dtype of ``g``, or the wider one of it and ``add``.
    """
    if add is not None:
        dtype = torch.promote_types(dy.g.dtype, add.g.dtype)
        wide = torch.promote_types(dtype, statistics_dtype(dtype))
        return (_bn_backward_apply(dy._replace(g=dy.g.to(wide))) + added_gradient(add)).to(dtype)
    grad = masked_gradient(dy)
    if dy.p is None:
        return grad
    out = grad.to(dy.p.dtype) * per_channel(dy.p)
    if dy.q is not None and dy.r is not None and dy.y is not None:
        y = dy.y.to(dy.p.dtype)
        centred = y if dy.mean is None else y - per_channel(dy.mean)
        out = out + centred * per_channel(dy.q) + per_channel(dy.r)
    return out.to(dy.g.dtype)


bn_backward_apply = Op(_bn_backward_apply)


GRADIENT = ("g_ptr", "mask_ptr", "y_ptr", "p_ptr", "q_ptr", "r_ptr", "mean_ptr")
"""What kernels that form dy read for it."""


def gradient_arguments(dy: OutputGrad, layout: Callable[[Tensor], Tensor] = channels_last) -> dict[str, Any]:
    """The parts of dy as kernels that form it are told of them; all of y's part or nothing of it."""
    whole = dy.q is not None and dy.r is not None and dy.y is not None
    y_part = {"y_ptr": None if dy.y is None else layout(dy.y), "q_ptr": dy.q, "r_ptr": dy.r, "mean_ptr": dy.mean}
    return {
        **gradient(dy.g, layout), **mask_arguments(dy), "p_ptr": dy.p,
        **(y_part if whole else dict.fromkeys(y_part)),
    }  # fmt: skip


def operands_of(dy: OutputGrad) -> int:
    """How many tensors of dy's size and dtype a kernel reads to form it."""
    return 1 + (dy.q is not None) + (dy.mask is not None and not is_bits(dy.mask))


@bn_backward_apply.triton
def _bn_backward_apply_triton(dy: OutputGrad, *, add: Added | None = None) -> Tensor:
    if dy.p is None and add is None:
        return masked_gradient(dy)
    if dy.p is None or not storable(dy.g, dy.y, None if add is None else add.g):
        return NotImplemented
    from fusedres.kernels.bn_backward import bn_backward_apply_kernel

    joining = None
    if add is not None:
        joining = channels_last(masked_gradient(add.grad if isinstance(add, ZeroPaddedGrad) else add))
    out = empty_rows(dy.g, dy.g.dtype if joining is None else torch.promote_types(dy.g.dtype, joining.dtype))
    arguments = {
        **gradient_arguments(dy, row_layout), "add_ptr": joining, **added_geometry(add), "H": out.shape[2],
        "W": out.shape[3],
    }  # fmt: skip
    rows = {
        "g_row": pitch_of(arguments["g_ptr"]) if arguments["image"] is None else None,
        "y_row": None if arguments["y_ptr"] is None else pitch_of(arguments["y_ptr"]),
    }
    per_value = 1 + (dy.mask is not None) + 4 * (arguments["q_ptr"] is not None) + (joining is not None)
    launch_rows(
        bn_backward_apply_kernel, dy.g, {**arguments, **rows, "dy_ptr": out}, reads=(*GRADIENT, "add_ptr"),
        kind="batch norm", writes=("dy_ptr",), flops=per_value * out.numel(),
        partial=added_read(add, None if joining is None else OutputGrad(joining)),
    )  # fmt: skip
    return out


def _bn_backward(
    g: OutputGrad, y: Tensor, norm: Normaliser, gamma: Tensor | None, *, batch_stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Both passes in one op: (dy, dgamma, dbeta) by `bn_backward_reduce` and `bn_backward_apply`.

    Args:
        g: (N, K, P, Q) gradient at the activation's output, masked on load.
        y: (N, K, P, Q) raw convolution output.
        norm: the `Normaliser` of the forward pass.
        gamma: (K,) or None.
        batch_stats: whether mean and invstd came from this batch (else they are constants).

    Returns:
        dy (N, K, P, Q) in the dtype of y, dgamma and dbeta (K,) in the statistics dtype.
    """
    sums = bn_backward_reduce(g, y, norm)
    return bn_backward_apply(output_grad(g, sums if batch_stats else None, y, norm)), sums.sum_gy, sums.sum_g


bn_backward = Op(_bn_backward)


@bn_backward.triton
def _bn_backward_triton(
    g: OutputGrad, y: Tensor, norm: Normaliser, gamma: Tensor | None, *, batch_stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _bn_backward(g, y, norm, gamma, batch_stats=batch_stats) if storable(g.g, y) else NotImplemented


@bn_backward.native
def _bn_backward_native(
    g: OutputGrad, y: Tensor, norm: Normaliser, gamma: Tensor | None, *, batch_stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if gamma is None or not batch_stats or norm.shared is not None:
        return NotImplemented
    # Where the two layouts differ the library sums in the storage dtype (dbeta off by 2e-3 in bf16).
    dtype = statistics_dtype(y.dtype)
    grad, raw = (channels_last(tensor.to(dtype)) for tensor in (masked_gradient(g), y))
    # On a CPU it takes these for contiguous where the activations are channels_last.
    weight, mean, invstd = (vector.contiguous() for vector in (gamma.to(dtype), norm.mean, norm.invstd))
    dy, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        grad, raw, weight, None, None, mean, invstd, True, 0.0, [True, True, True]
    )
    return dy.to(y.dtype), dgamma, dbeta
