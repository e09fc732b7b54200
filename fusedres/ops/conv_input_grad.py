"""The gradient that a convolution sends to its input, with the producer's activation or the shortcut joined to it."""

from typing import NamedTuple

import torch
from torch import Tensor

from fusedres.activation import IDENTITY
from fusedres.operands import ConvInput, Geometry, OutputGrad, Producer, statistics_dtype
from fusedres.ops import onednn
from fusedres.ops.bn_backward import NormSums, added_gradient, bn_backward_apply, bn_backward_reduce, masked_gradient
from fusedres.ops.checks import check_activation, check_conv_shapes, check_producer
from fusedres.ops.conv_forward import conv_operand
from fusedres.ops.features import FeatureGrads, add_feature_grad, check_features
from fusedres.ops.input_gradients import launch_input_grad, why_no_kernel
from fusedres.ops.op import Op
from fusedres.ops.rows import pitch_of, row_layout
from fusedres.ops.zero_pad_shortcut import Added, ZeroPaddedGrad
from fusedres.runtime import backends


class ProducerGrad(NamedTuple):
    """The gradient behind the producer's activation and the sums of it that its batch norm needs."""

    g: Tensor
    sums: NormSums


def input_grad(dy: Tensor, weight: Tensor, size: tuple[int, ...], geometry: Geometry) -> Tensor:
    """The transposed convolution of ``dy``, as the library computes it, channels_last."""
    # Only the shape and layout of this operand are read, so it costs no memory traffic; where dy has both, no memory.
    like = dy
    if dy.shape != size or not dy.is_contiguous(memory_format=torch.channels_last):
        like = torch.empty(size, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    stride, padding, dilation, groups = geometry
    du: Tensor = torch.ops.aten.convolution_backward(
        dy, like, weight, None, stride, padding, dilation, False, (0, 0), groups, (True, False, False)
    )[0]
    return du


def at_producer(du: Tensor, producer: Producer) -> ProducerGrad:
    """``du`` behind the producer's activation and the sums of it, in passes of their own."""
    y, norm, _, mask, act = producer
    if mask is None:
        told_by = ConvInput(y, norm.scale, norm.shift, IDENTITY) if act.needs_input else producer.output
        mask = conv_operand(told_by)
    g = masked_gradient(OutputGrad(du, mask, act=act))
    return ProducerGrad(g, bn_backward_reduce(OutputGrad(g), y, norm))


def check_gradient(
    dy: OutputGrad, weight: Tensor, size: tuple[int, ...], geometry: Geometry, *, add: Added | None = None
) -> None:
    """Refuse a ``dy`` that is not the gradient of what ``weight`` makes of an input of ``size``."""
    check_activation("dy", dy.g, weight.shape[0])
    p, q = check_conv_shapes("size", size, weight, geometry)
    if dy.g.shape != (size[0], weight.shape[0], p, q):
        raise ValueError(f"dy: expected shape {(size[0], weight.shape[0], p, q)}, got {tuple(dy.g.shape)}")


def _conv_input_grad(
    dy: OutputGrad,
    weight: Tensor,
    size: tuple[int, ...],
    geometry: Geometry,
    *,
    add: Added | None = None,
) -> Tensor:
    """du = dy convolved with the transposed weight, plus the masked ``add``.

    Args:
        dy: (N, K, P, Q), formed on load.
        weight: (K, C/groups, R, S) in the dtype of dy.
        size: (N, C, H, W) of the input.
        geometry: that of the forward convolution.
        add: a gradient of the same input from elsewhere (the shortcut), masked on load, or what a zero-pad shortcut
            makes of one, or None.

    Returns:
        du (N, C, H, W) channels_last, in the wider dtype of dy and ``add``.
    """
    dtype = statistics_dtype(weight.dtype)
    du = input_grad(bn_backward_apply(dy).to(dtype), weight.to(dtype), size, geometry)
    if add is None:
        return du.to(weight.dtype)
    return (du + added_gradient(add)).to(torch.promote_types(weight.dtype, add.g.dtype))


conv_input_grad = Op(_conv_input_grad, check=check_gradient, weighed=True)


@conv_input_grad.triton
def _conv_input_grad_triton(
    dy: OutputGrad,
    weight: Tensor,
    size: tuple[int, ...],
    geometry: Geometry,
    *,
    add: Added | None = None,
) -> Tensor:
    # With nothing joined to it a convolution moves no fewer bytes than the library's.
    if backends.runs_native() and add is None and dy.mask is None and dy.p is None:
        return NotImplemented
    if why_no_kernel(dy, weight, size, geometry) is not None:
        return NotImplemented
    return launch_input_grad(dy, weight, size, geometry, add=add).g


def check_producer_grad(
    dy: OutputGrad, weight: Tensor, geometry: Geometry, producer: Producer, *, add: Added | None = None,
    features: FeatureGrads | None = None,
) -> None:  # fmt: skip
    """Refuse what `check_gradient`, `check_producer` and `check_features` refuse."""
    check_producer(producer)
    check_gradient(dy, weight, tuple(producer.y.shape), geometry)
    if features is not None:
        check_features(features, producer.y.shape)


def _conv_producer_grad(
    dy: OutputGrad, weight: Tensor, geometry: Geometry, producer: Producer, *, add: Added | None = None,
    features: FeatureGrads | None = None,
) -> ProducerGrad:  # fmt: skip
    """du as `conv_input_grad` gives it, behind the activation of the layer that made the input, and the sums of it.

    Args:
        dy: (N, K, P, Q), formed on load.
        weight: (K, C/groups, R, S) in the dtype of dy.
        geometry: that of the forward convolution.
        producer: of the convolution's input, (N, C, H, W); a slice of wider rows (`pitch_of`) is read where it is.
        add: as in `conv_input_grad`; it goes through the activation too.
        features: what g is added to, times the producer's scale, instead of being written (`add_feature_grad`).

    Returns:
        g = du times the slope of the producer's activation, told from its rounded output, (N, C, H, W) channels_last,
        and the `NormSums` of g as stored, of the producer's y and batch norm; ``features.into`` in its place if there
        are some, and the sums of g before it is added.
    """
    found = at_producer(conv_input_grad(dy, weight, tuple(producer.y.shape), geometry, add=add), producer)
    return found if features is None else sent_to_features(found, producer, features)


def sent_to_features(found: ProducerGrad, producer: Producer, features: FeatureGrads) -> ProducerGrad:
    """A gradient in memory as a part of that of ``features``."""
    add_feature_grad(features, found.g, producer.norm.scale)
    return found._replace(g=features.into)


conv_producer_grad = Op(_conv_producer_grad, check=check_producer_grad)


@conv_producer_grad.triton
def _conv_producer_grad_triton(
    dy: OutputGrad, weight: Tensor, geometry: Geometry, producer: Producer, *, add: Added | None = None,
    features: FeatureGrads | None = None,
) -> ProducerGrad:  # fmt: skip
    size = tuple(producer.y.shape)
    if why_no_kernel(dy, weight, size, geometry) is not None:
        return NotImplemented
    if features is not None and not takes(features, producer, weight):
        return NotImplemented
    launched = launch_input_grad(dy, weight, size, geometry, producer=producer, add=add, features=features)
    assert launched.sums is not None
    return ProducerGrad(launched.g, launched.sums)


def takes(features: FeatureGrads, producer: Producer, weight: Tensor) -> bool:
    """Whether kernels add to these where they lie: in the storage dtype, rows as far apart as y's."""
    alike = all(row_layout(t) is t and pitch_of(t) == pitch_of(producer.y) for t in (producer.y, *features))
    return alike and features.into.dtype == weight.dtype and producer.out is None


def joined_by_onednn(weight: Tensor, geometry: Geometry, add: OutputGrad) -> bool:
    """Whether a 1x1 convolution's input gradient, itself a 1x1 convolution, accumulates onto the shortcut's.

    Transposing a weight as large as the gradient would cost more than the pass that this spares.
    """
    pointwise = weight.shape[2:] == (1, 1) and geometry == Geometry()
    small = 4 * weight.numel() <= add.g.numel()
    return pointwise and small and add.g.dtype == weight.dtype and onednn.runs(weight)


def with_added(du: Tensor, add: Added | None) -> Tensor:
    """``du``, whose memory may be written to, plus the masked ``add``, in the wider dtype of the two."""
    if add is None:
        return du
    if isinstance(add, ZeroPaddedGrad):
        du = du.to(torch.promote_types(du.dtype, add.g.dtype))
        du[:, :, :: add.stride[0], :: add.stride[1]] += masked_gradient(add.grad)[:, add.places]
        return du
    shortcut = masked_gradient(add)
    return du.add_(shortcut) if shortcut.dtype == du.dtype else du + shortcut


@conv_input_grad.native
def _conv_input_grad_native(
    dy: OutputGrad,
    weight: Tensor,
    size: tuple[int, ...],
    geometry: Geometry,
    *,
    add: Added | None = None,
) -> Tensor:
    grad = bn_backward_apply(dy)
    if isinstance(add, OutputGrad) and joined_by_onednn(weight, geometry, add):
        shortcut, transposed = masked_gradient(add), onednn.pointwise(weight.flatten(1).t())
        if add.scratch:
            return onednn.conv_onto(shortcut, grad, transposed)
        return onednn.conv(grad, transposed, None, geometry).add_(shortcut)
    return with_added(input_grad(grad, weight, size, geometry), add)
