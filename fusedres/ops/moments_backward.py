"""The backward pass of a 1x1 convolution and its batch norm without the convolution's output.

With g the masked gradient behind the batch norm, D = sum(g u^T) (the one large contraction of the weight gradient),
mean and M the `Moments` of the input u, and a, invstd of the `Normaliser`:

    D' = D - sum(g) mean^T      dgamma = invstd * rowsum(W * D')      dbeta = sum(g)
    m1 = dbeta / n    m2 = dgamma / n    q = a * m2 * invstd
    dW = a * D' - q * (W M)
    du = (a * g) W - u Q - c    Q = W^T diag(q) W    c = W^T (a * m1) - Q mean

which follows from dy = a * (g - m1 - y_hat * m2) and y_hat = invstd * W (u - mean). D' and M are centred, so that dW
and dgamma lose nothing where the mean is large. In du, where u meets Q as it is, u Q and Q mean cancel there.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fusedres.operands import ConvInput, Geometry, Moments, Normaliser, OutputGrad, Producer, statistics_dtype
from fusedres.ops import onednn
from fusedres.ops.bn_backward import added_gradient, bn_backward_coefficients, masked_gradient
from fusedres.ops.checks import check_producer
from fusedres.ops.conv_forward import conv_operand
from fusedres.ops.conv_input_grad import ProducerGrad, at_producer, with_added
from fusedres.ops.conv_weight_grad import summed_weight_grad, weight_grad, weight_grad_parts
from fusedres.ops.input_gradients import InputMatrices, Launched, launch_input_grad, why_no_kernel
from fusedres.ops.input_moments import sampled
from fusedres.ops.op import Op
from fusedres.ops.rows import as_rows, channels_last, from_rows, storable
from fusedres.ops.zero_pad_shortcut import Added
from fusedres.plan.tiles import matrix_tile, weight_rows_tile
from fusedres.runtime.launch import launch, target_of


class MomentsGrad(NamedTuple):
    """The parameters' gradients in the statistics dtype: ``dweight`` (K, C), ``dgamma`` (K,), ``dbeta`` (K,)."""

    dweight: Tensor
    dgamma: Tensor
    dbeta: Tensor


class InputGradMatrices(NamedTuple):
    """du = (``scale`` * g) ``weight`` + u ``quadratic`` + sum of ``constants``.

    ``weight`` = W (K, C), ``scale`` = a (K,), ``quadratic`` = -Q and ``constants`` (T, C) whose sum is -c, the last two
    None under frozen statistics. Q is (C, 1, C) in the statistics dtype, or (C, terms, C) in the storage dtype, where
    its terms add up to it.
    """

    weight: Tensor
    scale: Tensor
    quadratic: Tensor | None
    constants: Tensor | None


def _moments_contraction(
    g: OutputGrad, u: ConvInput, kernel: tuple[int, int], geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """D = sum(g u^T) and sum(g) over the pixels.

    Args:
        g: (N, K, P, Q), masked on load.
        u: (N, C, H, W) input of the convolution, formed on load.
        kernel: (R, S); u^T is the window of C R S values under it.
        geometry: of the convolution.

    Returns:
        D (K, C R S) and sum(g) (K,) in the statistics dtype.
    """
    # D is centred afterwards, so it must not be rounded to 16 bits on the way, as the library's own would be.
    dtype = statistics_dtype(u.tensor.dtype)
    grad = masked_gradient(g).to(dtype)
    d = weight_grad(grad, conv_operand(u).to(dtype), kernel, geometry).flatten(1)
    return d, as_rows(grad).sum(0)


moments_contraction = Op(_moments_contraction)


@moments_contraction.triton
def _moments_contraction_triton(
    g: OutputGrad, u: ConvInput, kernel: tuple[int, int], geometry: Geometry
) -> tuple[Tensor, Tensor]:
    launched = summed_weight_grad(g, u, kernel, geometry)
    if launched is None or launched.sum_dy is None:
        return NotImplemented
    return launched.dw.flatten(1), launched.sum_dy


def moments_weight_grad(
    d: Tensor, sum_g: Tensor, count: int, mean: Tensor, product: Tensor, weight: Tensor, norm: Normaliser
) -> tuple[Tensor, Tensor, Tensor]:
    """dW, dgamma and q by the formulas above, for a convolution of any kernel.

    Args:
        d: (K, C R S), sum_g: (K,), from `moments_contraction`.
        count: n.
        mean: (C R S,) of the input's windows.
        product: W M (K, C R S), which is also the sum of (y - mean_y) u^T.
        weight: (K, C R S), the rounded one that the contraction used.
        norm: the `Normaliser` of the forward pass.
    """
    centred = d - torch.outer(sum_g, mean)
    dgamma = norm.invstd * (weight * centred).sum(1)
    q = norm.scale * norm.invstd * dgamma / count
    return norm.scale.unsqueeze(1) * centred - q.unsqueeze(1) * product, dgamma, q


def frozen_weight_grad(d: Tensor, sum_g: Tensor, weight: Tensor, norm: Normaliser) -> tuple[Tensor, Tensor]:
    """dW = a * D and dgamma = invstd * (rowsum(W * D) - mean * dbeta), for frozen statistics (m1 = m2 = 0)."""
    return norm.scale.unsqueeze(1) * d, norm.invstd * ((weight * d).sum(1) - norm.mean * sum_g)


def _moments_backward(
    g: OutputGrad, u: ConvInput, moments: Moments | None, weight: Tensor, norm: Normaliser, geometry: Geometry
) -> tuple[MomentsGrad, InputGradMatrices]:
    """The parameters' gradients and the small matrices of the input's, by the formulas above.

    Args:
        g: (N, K, P, Q), masked on load.
        u: (N, C, H, W) input of the convolution, formed on load.
        moments: of the input; None when mean and variance are frozen.
        weight: (K, C, 1, 1), the rounded one that the contraction used.
        norm: the `Normaliser` of the forward pass.
        geometry: of the 1x1 convolution.
    """
    if moments is not None and norm.shared is not None:
        sums = moments_sums(g, u, moments, weight, norm, geometry)
        q, r = bn_backward_coefficients(sums.sum_g, sums.sum_gy, moments.pixels, norm)
        return shared_moments_backward(sums, q, r, moments, weight, norm)
    d, sum_g = moments_contraction(g, u, (1, 1), geometry)
    w = weight.flatten(1).to(d.dtype)
    if moments is None:
        dweight, dgamma = frozen_weight_grad(d, sum_g, w, norm)
        return MomentsGrad(dweight, dgamma, sum_g), frozen_matrices(weight, norm)
    count, mean, m2 = moments
    dweight, dgamma, q = moments_weight_grad(d, sum_g, count, mean, w @ m2, w, norm)
    quadratic = -(w.t() @ (q.unsqueeze(1) * w))
    constant = w.t() @ (norm.scale * sum_g / count) + quadratic @ mean
    small = MomentsGrad(dweight, dgamma, sum_g)
    return small, frozen_matrices(weight, norm)._replace(
        quadratic=quadratic.unsqueeze(1), constants=-constant.unsqueeze(0)
    )


class MomentsSums(NamedTuple):
    """Of a batch norm whose statistics are shared, from this process's pixels: D' (K, C), and the sums (K,) of g and of
    g * y_hat, the gradients of beta and gamma."""

    centred: Tensor
    sum_g: Tensor
    sum_gy: Tensor


def moments_sums(
    g: OutputGrad, u: ConvInput, moments: Moments, weight: Tensor, norm: Normaliser, geometry: Geometry
) -> MomentsSums:
    """What `moments_backward` contracts, where the statistics are of several processes; the arguments are its.

    The mean of this process's own y is not that of all, but ``off`` = W mean_u - mean_y beside it:
    dgamma = invstd * (rowsum(W * D') + off * sum(g)).
    """
    d, sum_g = moments_contraction(g, u, (1, 1), geometry)
    w = weight.flatten(1).to(d.dtype)
    centred = d - torch.outer(sum_g, moments.mean)
    return MomentsSums(centred, sum_g, norm.invstd * ((w * centred).sum(1) + (w @ moments.mean - norm.mean) * sum_g))


def shared_moments_backward(
    sums: MomentsSums, q: Tensor, r: Tensor, moments: Moments, weight: Tensor, norm: Normaliser
) -> tuple[MomentsGrad, InputGradMatrices]:
    """What `moments_backward` gives, where the statistics are of several processes.

    With dy = a g + q (y - mean_y) + r by `bn_backward_coefficients`, whose sum over this process's n pixels is not 0:

        dW = a * D' + q * (W M) + (a * sum(g) + n * (r + q * off)) mean^T
        Q = -W^T diag(q) W    c = -W^T (r + q * off) - Q mean
    """
    centred, sum_g, dgamma = sums
    count, mean, m2 = moments
    w = weight.flatten(1).to(centred.dtype)
    constant = r + q * (w @ mean - norm.mean)
    rest = norm.scale * sum_g + count * constant
    dweight = norm.scale.unsqueeze(1) * centred + q.unsqueeze(1) * (w @ m2) + torch.outer(rest, mean)
    quadratic = w.t() @ (q.unsqueeze(1) * w)
    matrices = frozen_matrices(weight, norm)._replace(
        quadratic=quadratic.unsqueeze(1), constants=(w.t() @ constant - quadratic @ mean).unsqueeze(0)
    )
    return MomentsGrad(dweight, dgamma, sum_g), matrices


moments_backward = Op(_moments_backward)


@moments_backward.triton
def _moments_backward_triton(
    g: OutputGrad, u: ConvInput, moments: Moments | None, weight: Tensor, norm: Normaliser, geometry: Geometry
) -> tuple[MomentsGrad, InputGradMatrices]:
    shared = norm.shared is not None and moments is not None
    parts = weight_grad_parts(g, u, (1, 1), geometry) if storable(weight) and not shared else None
    if parts is None:
        return NotImplemented
    from fusedres.kernels.moments import moments_matrices_kernel

    (k, c), tile = weight.shape[:2], matrix_tile(target_of(weight), weight.dtype)
    w = channels_last(weight).view(k, c)
    values = parts.whole
    d, sum_g = values[:, : k * c], values[:, k * c :]
    small, q = launch_moments_centre(d, sum_g, moments and moments.pixels, moments and moments.mean, None, w, norm)
    matrices = frozen_matrices(weight, norm)
    if moments is None:
        return small, matrices
    pieces = -(-c // tile.block_c)
    terms = 1 if w.dtype == torch.float32 else 2
    quadratic = torch.empty((c, terms, c), dtype=w.dtype, device=w.device)
    constants = torch.empty((pieces, c), dtype=torch.float32, device=w.device)
    read = {
        "mean_ptr": moments.mean, "m2_ptr": moments.m2, "w_ptr": w, "q_ptr": q, "scale_ptr": norm.scale,
        "sum_g_ptr": small.dbeta, "dw_ptr": small.dweight,
    }  # fmt: skip
    written = {"quadratic_ptr": quadratic, "constant_ptr": constants}
    pairs, tiles = pieces * (pieces + 1) // 2, -(-k // tile.block_k) * pieces
    steps = [pairs * -(-k // tile.depth) / (pairs + tiles), tiles * -(-c // tile.depth) / (pairs + tiles)]
    launch(
        moments_matrices_kernel, (pairs + tiles,),
        {
            **read, **written, "pixels": moments.pixels, "C": c, "K": k, "TERMS": terms, "PRECISION": tile.precision,
            "BLOCK_K": tile.block_k, "BLOCK_C": tile.block_c, "DEPTH": tile.depth,
        },
        reads=tuple(read), kind="moments", writes=("dw_ptr", *written), flops=k * c * (3 * c + 3),
        steps=(0, *steps), **tile.options,
    )  # fmt: skip
    return small, matrices._replace(quadratic=quadratic, constants=constants)


def launch_moments_centre(
    d: Tensor, sum_g: Tensor, count: int | None, mean: Tensor | None, product: Tensor | None, w: Tensor,
    norm: Normaliser,
) -> tuple[MomentsGrad, Tensor | None]:  # fmt: skip
    """`moments_weight_grad` by its kernel, from D (parts, K C) and sum(g) (parts, K) in parts of one buffer.

    Where there is neither a ``product`` (K, C) nor frozen statistics, D' is in the place of dW. Without a ``mean``
    statistics are frozen, and there is no q.
    """
    from fusedres.kernels.moments import moments_centre_kernel

    (k, c), batch = w.shape, mean is not None
    tile = weight_rows_tile(len(d), k, c)
    dw = torch.empty((k, c), dtype=torch.float32, device=d.device)
    dgamma, dbeta, q = torch.empty((3, k), dtype=torch.float32, device=d.device)
    read = {
        "d_ptr": d, "sum_g_ptr": sum_g, "mean_ptr": mean, "product_ptr": product, "w_ptr": w,
        "y_mean_ptr": None if batch else norm.mean, "invstd_ptr": norm.invstd, "scale_ptr": norm.scale,
    }  # fmt: skip
    written = {"dw_ptr": dw, "dgamma_ptr": dgamma, "dbeta_ptr": dbeta, "q_ptr": q if batch else None}
    launch(
        moments_centre_kernel, (-(-k // tile.block_k),),
        {
            **read, **written, "parts": len(d), "part_size": d.stride(0), "pixels": count or 1, "C": c, "K": k,
            "BLOCK_PARTS": tile.block_parts, "BLOCK_K": tile.block_k, "BLOCK_C": tile.block_c,
        },
        reads=tuple(read), kind="moments", writes=tuple(written), flops=d.numel() + 6 * k * c,
        steps=(-(-len(d) // tile.block_parts),), **tile.options,
    )  # fmt: skip
    return MomentsGrad(dw, dgamma, dbeta), q if batch else None


def frozen_matrices(weight: Tensor, norm: Normaliser) -> InputGradMatrices:
    """Those of a batch norm with frozen statistics; weight (K, C, 1, 1)."""
    return InputGradMatrices(weight.flatten(1), norm.scale, None, None)


def _moments_input_grad(
    g: OutputGrad, matrices: InputGradMatrices, u: ConvInput, geometry: Geometry, *, add: Added | None = None,
    compact: bool = False,
) -> Tensor:  # fmt: skip
    """du = (a * g) W - u Q - c at the pixels that the 1x1 convolution reads, zero elsewhere, plus the masked ``add``.

    Args:
        g: (N, K, P, Q), masked on load.
        matrices: from `moments_backward`.
        u: (N, C, H, W) input of the 1x1 convolution, formed on load.
        geometry: of the 1x1 convolution (stride alone).
        add: another gradient of the same input, (N, C, H, W), masked on load, or None.
        compact: whether the pixels that the convolution does not read are left out.

    Returns:
        du (N, C, H, W), or (N, C, P, Q) if ``compact``, channels_last, in the wider dtype of u and ``add``.
    """
    seen = sampled(u, geometry.stride)
    dtype = statistics_dtype(u.tensor.dtype)
    rows = (as_rows(masked_gradient(g)).to(dtype) * matrices.scale) @ matrices.weight.to(dtype)
    if matrices.quadratic is not None and matrices.constants is not None:
        rows.addmm_(as_rows(conv_operand(seen)).to(dtype), matrices.quadratic.to(dtype).sum(1))
        rows.add_(matrices.constants.sum(0))
    du = from_rows(rows, seen.tensor)
    if not compact:
        du = _spread(du, u.tensor, geometry.stride)
    if add is None:
        return du.to(u.tensor.dtype)
    return (du + added_gradient(add)).to(torch.promote_types(u.tensor.dtype, add.g.dtype))


def _spread(seen: Tensor, like: Tensor, stride: tuple[int, int]) -> Tensor:
    """``seen`` at every stride-th pixel of a tensor shaped like ``like``, zero elsewhere."""
    if stride == (1, 1):
        return seen
    spread = torch.zeros_like(like, dtype=seen.dtype, memory_format=torch.channels_last)
    spread[:, :, :: stride[0], :: stride[1]] = seen
    return spread


moments_input_grad = Op(_moments_input_grad)


@moments_input_grad.triton
def _moments_input_grad_triton(
    g: OutputGrad, matrices: InputGradMatrices, u: ConvInput, geometry: Geometry, *, add: Added | None = None,
    compact: bool = False,
) -> Tensor:  # fmt: skip
    launched = _launched(g, matrices, u, geometry, add=add, compact=compact)
    return NotImplemented if launched is None else launched.g


def _check_producer_grad(
    g: OutputGrad, matrices: InputGradMatrices, geometry: Geometry, producer: Producer, *, add: Added | None = None
) -> None:
    check_producer(producer)


def _moments_producer_grad(
    g: OutputGrad, matrices: InputGradMatrices, geometry: Geometry, producer: Producer, *, add: Added | None = None
) -> ProducerGrad:
    """du as `moments_input_grad` gives it, behind the activation of the layer that made u, and the sums of it.

    Args:
        g: (N, K, P, Q), masked on load.
        matrices: from `moments_backward`.
        geometry: of the 1x1 convolution.
        producer: of its input (N, C, H, W).
        add: another gradient of the same input, masked on load, which goes through the activation too, or None.

    Returns:
        As `conv_producer_grad`.
    """
    return at_producer(moments_input_grad(g, matrices, producer.output, geometry, add=add), producer)


moments_producer_grad = Op(_moments_producer_grad, check=_check_producer_grad)


@moments_producer_grad.triton
def _moments_producer_grad_triton(
    g: OutputGrad, matrices: InputGradMatrices, geometry: Geometry, producer: Producer, *, add: Added | None = None
) -> ProducerGrad:
    launched = _launched(g, matrices, producer.output, geometry, add=add, producer=producer)
    if launched is None or launched.sums is None:
        return NotImplemented
    return ProducerGrad(launched.g, launched.sums)


def _launched(
    g: OutputGrad, matrices: InputGradMatrices, u: ConvInput, geometry: Geometry, *, add: Added | None = None,
    producer: Producer | None = None, compact: bool = False,
) -> Launched | None:  # fmt: skip
    """One pass by `conv_input_grad_kernel`, or None where there is no kernel."""
    dtype, size, x_stride = u.tensor.dtype, tuple(u.tensor.shape), None
    if compact:
        size, geometry, x_stride = (*size[:2], *g.g.shape[2:]), geometry._replace(stride=(1, 1)), geometry.stride
    g = g._replace(p=matrices.scale)
    weight = matrices.weight[:, :, None, None]
    if why_no_kernel(g, weight, size, geometry) is not None:
        return None
    square = None
    if matrices.quadratic is not None and matrices.constants is not None:
        square = InputMatrices(_in_terms(matrices.quadratic, dtype), matrices.constants)
    consumed = None if square is None else u
    return launch_input_grad(
        g, weight, size, geometry, x=consumed, matrices=square, add=add, producer=producer, x_stride=x_stride
    )


def _in_terms(quadratic: Tensor, dtype: torch.dtype) -> Tensor:
    """Q (C, terms, C) in a storage dtype: of 16 bits, the two terms that the matrix is rounded to."""
    if quadratic.dtype == dtype or dtype == torch.float32:
        return quadratic.to(dtype)
    first = quadratic.to(dtype)
    return torch.cat([first, (quadratic - first.to(quadratic.dtype)).to(dtype)], 1)


@moments_input_grad.native
def _moments_input_grad_native(
    g: OutputGrad, matrices: InputGradMatrices, u: ConvInput, geometry: Geometry, *, add: Added | None = None,
    compact: bool = False,
) -> Tensor:  # fmt: skip
    if not onednn.runs(u.tensor) or (add is not None and add.g.dtype != u.tensor.dtype):
        return NotImplemented
    linear = onednn.pointwise((matrices.scale.unsqueeze(1) * matrices.weight).t())
    if matrices.quadratic is None or matrices.constants is None:
        du = onednn.conv(masked_gradient(g), linear, None, Geometry())
    else:
        seen = channels_last(conv_operand(sampled(u, geometry.stride)))
        du = onednn.conv(seen, onednn.pointwise(matrices.quadratic.sum(1)), matrices.constants.sum(0), Geometry())
        onednn.conv_onto(du, masked_gradient(g), linear)
    if not compact:
        du = _spread(du, u.tensor, geometry.stride)
    return with_added(du, add)
