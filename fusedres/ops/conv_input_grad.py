"""The gradient that a convolution sends to its input, with the producer's ReLU or the shortcut joined to it."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import onednn
from .bn_act import bn_act
from .bn_backward import bn_backward_apply, bn_backward_reduce, masked
from .contract import Geometry, Normaliser, OutputGrad, check_activation, statistics_dtype
from .op import Op


class Producer(NamedTuple):
    """The layer that made a convolution's input as relu(y * scale + shift), raw output and numbers."""

    y: Tensor
    norm: Normaliser


class ProducerGrad(NamedTuple):
    """What the producer's batch norm needs: g behind its ReLU, sum(g) and sum(g * y_hat)."""

    g: Tensor
    sum_g: Tensor
    sum_gy: Tensor


def input_grad(dy: Tensor, weight: Tensor, size: tuple[int, ...], geometry: Geometry) -> Tensor:
    """The transposed convolution of ``dy``, as the library computes it, channels_last."""
    # Only the shape and layout of this operand are read, so it costs no memory traffic.
    like = torch.empty(size, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    stride, padding, dilation, groups = geometry
    du: Tensor = torch.ops.aten.convolution_backward(
        dy, like, weight, None, stride, padding, dilation, False, (0, 0), groups, (True, False, False)
    )[0]
    return du


def at_producer(du: Tensor, producer: Producer, u: Tensor | None = None) -> ProducerGrad:
    """``du`` behind the producer's ReLU and the sums of it; ``u`` is the rectified output where it was written."""
    if u is None:
        u, _ = bn_act(producer.y, producer.norm.scale, producer.norm.shift)
    g = masked(OutputGrad(du, u))
    return ProducerGrad(g, *bn_backward_reduce(OutputGrad(g), producer.y, producer.norm))


def _conv_input_grad(
    dy: OutputGrad,
    weight: Tensor,
    size: tuple[int, ...],
    geometry: Geometry,
    *,
    add: OutputGrad | None = None,
) -> Tensor:
    """du = dy convolved with the transposed weight, plus the masked ``add``.

    Args:
        dy: (N, K, P, Q), formed on load.
        weight: (K, C/groups, R, S) in the dtype of dy.
        size: (N, C, H, W) of the input.
        geometry: that of the forward convolution.
        add: a gradient of the same input from elsewhere (the shortcut), masked on load, or None.

    Returns:
        du (N, C, H, W) channels_last, in the wider dtype of dy and ``add``.
    """
    check_activation("dy", dy.g, weight.shape[0])
    dtype = statistics_dtype(weight.dtype)
    du = input_grad(bn_backward_apply(dy).to(dtype), weight.to(dtype), size, geometry)
    if add is None:
        return du.to(weight.dtype)
    return (du + masked(add)).to(torch.promote_types(weight.dtype, add.g.dtype))


conv_input_grad = Op(_conv_input_grad)


def joined_by_onednn(weight: Tensor, geometry: Geometry, add: OutputGrad) -> bool:
    """Whether a 1x1 convolution's input gradient, itself a 1x1 convolution, accumulates onto the shortcut's.

    Transposing a weight as large as the gradient would cost more than the pass that this spares.
    """
    pointwise = weight.shape[2:] == (1, 1) and geometry == Geometry()
    small = 4 * weight.numel() <= add.g.numel()
    return pointwise and small and add.g.dtype == weight.dtype and onednn.runs(weight)


def joined(du: Tensor, add: OutputGrad | None) -> Tensor:
    """``du``, whose memory may be written to, plus the masked ``add``, in the wider dtype of the two."""
    if add is None:
        return du
    shortcut = masked(add)
    return du.add_(shortcut) if shortcut.dtype == du.dtype else du + shortcut


@conv_input_grad.native
def _conv_input_grad_native(
    dy: OutputGrad,
    weight: Tensor,
    size: tuple[int, ...],
    geometry: Geometry,
    *,
    add: OutputGrad | None = None,
) -> Tensor:
    check_activation("dy", dy.g, weight.shape[0])
    grad = bn_backward_apply(dy)
    if add is not None and joined_by_onednn(weight, geometry, add):
        shortcut, transposed = masked(add), onednn.pointwise(weight.flatten(1).t())
        if add.scratch:
            return onednn.conv_onto(shortcut, grad, transposed)
        return onednn.conv_act(grad, transposed, shortcut)
    return joined(input_grad(grad, weight, size, geometry), add)
