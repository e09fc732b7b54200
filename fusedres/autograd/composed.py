"""The fused patterns once more, of differentiable PyTorch: gradients that have derivatives, in every dtype.

Each Function's ``composed`` names its inputs and the form of its pattern up to the last ReLU. Through that ReLU
gradients go by the mask that the forward pass kept: it is constant where a derivative exists, so that what only joins
a sum before it (a shortcut, a residual) is never asked for its values.

Batch statistics are measured again, by a formula that PyTorch differentiates (its own batch norm refuses eps = 0).
Where running statistics normalised, they are taken from the forward pass, for they may have moved since. Nothing here
writes to running statistics or counters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d

from ..ops.contract import Normaliser, per_channel, statistics_dtype
from ..ops.relu_mask import is_bits, unpack_relu_mask
from ..ops.zero_pad_shortcut import zero_pad_shortcut
from .spec import ChainSpec, ConvBN, LayerSpec, NormSpec, NormTensors, StemSpec

if TYPE_CHECKING:
    from .dense import DenseSpec, DenseTensors
    from .preact import PreActSpec


class Composed(NamedTuple):
    """A pattern as a plain function.

    ``inputs`` are in the order of the Function's ``apply``, None for what is no tensor or not needed; ``form`` takes
    all of them and gives the output before the ReLU of ``mask`` (a bit mask or the rectified output; None: there is
    no ReLU).
    """

    inputs: tuple[Tensor | None, ...]
    form: Callable[..., Tensor]
    mask: Tensor | None = None


def composed_gradients(ctx: Any, dz: Tensor, *, create_graph: bool) -> tuple[Tensor | None, ...]:
    """The gradients of everything that was given to a Function, through its plain form.

    Args:
        ctx: of a Function that has ``composed(ctx, dz)``, after its forward pass.
        dz: the gradient at its first output, or a batch of them.
        create_graph: whether what is returned can be differentiated, in all inputs and in ``dz``.
    """
    with torch.enable_grad():
        inputs, form, mask = ctx._forward_cls.composed(ctx, dz)
        # A weight may have made x too: by aliases only what the form itself does with an input counts.
        inputs = [
            None if tensor is None else tensor.view_as(tensor) if needed else tensor.detach()
            for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=True)
        ]
        z = form(*inputs)
        if mask is not None:
            open_ = unpack_relu_mask(mask, z.shape[1]) if is_bits(mask) else mask.detach() > 0
            z = torch.where(open_, z, 0.0)
        places = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        wanted = [inputs[i] for i in places]
        found = torch.autograd.grad(z, wanted, dz.to(z.dtype), create_graph=create_graph, allow_unused=True)
    grads: list[Tensor | None] = [None] * len(inputs)
    for i, tensor, grad in zip(places, wanted, found, strict=True):
        # A bias before batch statistics changes nothing.
        grads[i] = torch.zeros_like(tensor) if grad is None else grad
    return tuple(grads)


def joining(like: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """Stands for what joins a sum of the size of ``like`` and has a gradient (zeros, one element in memory)."""
    if dtype is None:
        return None
    return torch.zeros(1, dtype=dtype, device=like.device).expand(like.shape).requires_grad_()


def normalised(y: Tensor, tensors: NormTensors, spec: NormSpec, norm: Normaliser | None) -> Tensor:
    """gamma * (y - mean) * invstd + beta in the statistics dtype; ``norm`` is the forward pass's."""
    y = y.to(statistics_dtype(y.dtype))
    if spec.batch_stats:
        y = y - per_channel(y.mean((0, 2, 3)))
        invstd = torch.rsqrt(y.square().mean((0, 2, 3)) + spec.eps)
    else:
        assert norm is not None
        mean, invstd = norm.mean, norm.invstd
        if tensors.bias is not None:
            # The bias is part of y, while the forward pass took it off the mean.
            bias = tensors.bias.to(y.dtype)
            y, mean = y + per_channel(bias), mean + bias.detach()
        y = y - per_channel(mean)
    y = y * per_channel(invstd if tensors.gamma is None else invstd * tensors.gamma.to(y.dtype))
    return y if tensors.beta is None else y + per_channel(tensors.beta.to(y.dtype))


def convolved(u: Tensor, layer: ConvBN, spec: LayerSpec) -> Tensor:
    """conv(u) without its bias, which belongs to the batch norm."""
    return conv2d(u, layer.weight.to(u.dtype), None, *spec.geometry)


def _layer(u: Tensor, layer: ConvBN, spec: LayerSpec, norm: Normaliser) -> Tensor:
    return normalised(convolved(u, layer, spec), layer.norm, spec.norm, norm)


def _inner(u: Tensor, layers: Sequence[ConvBN], specs: Sequence[LayerSpec], norms: Sequence[Normaliser]) -> Tensor:
    """relu(bn(conv(...))) by every layer that has a norm."""
    for layer, spec, norm in zip(layers, specs, norms, strict=False):
        u = torch.relu(_layer(u, layer, spec, norm)).to(u.dtype)
    return u


def chain(
    x: Tensor, residual: Tensor | None, spec: ChainSpec, layers: Sequence[ConvBN], norms: Sequence[Normaliser]
) -> Tensor:
    """`ConvChain` before its ReLU; ``norms`` are its layers' and the projection's."""
    source = x.to(spec.dtype)
    last = len(spec.layers) - 1
    u = _inner(source, layers, spec.layers, norms[:last])
    z = _layer(u, layers[last], spec.layers[last], norms[last])
    if spec.projection is not None:
        return z + _layer(source, layers[-1], spec.projection, norms[-1])
    return _with_shortcut(z, x, spec) if residual is None else z + residual


def _with_shortcut(z: Tensor, x: Tensor, spec: ChainSpec | PreActSpec) -> Tensor:
    if spec.shortcut == "identity":
        return z + x
    if spec.shortcut == "zero_pad":
        return z + zero_pad_shortcut(x, z.shape[1], spec.zero_pad_stride)
    return z


def stem(x: Tensor, spec: StemSpec, layer: ConvBN, norm: Normaliser) -> Tensor:
    """`StemPool` as a whole."""
    u = torch.relu(_layer(x.to(spec.dtype), layer, spec.layer, norm)).to(spec.dtype)
    return max_pool2d(u, *spec.pool)


def preact(
    x: Tensor, spec: PreActSpec, first: NormTensors, layers: Sequence[ConvBN], norms: Sequence[Normaliser | None]
) -> Tensor:
    """`PreAct`; ``norms`` are that of x and those inside."""
    source = x
    if spec.norm is not None:
        source = torch.relu(normalised(x, first, spec.norm, norms[0])).to(x.dtype)
    source = source.to(spec.dtype)
    last = len(spec.layers) - 1
    u = _inner(source, layers, spec.layers, norms[1:])  # type: ignore[arg-type]
    z = convolved(u, layers[last], spec.layers[last])
    if spec.projection is not None:
        return z + convolved(source, layers[-1], spec.projection)
    return _with_shortcut(z, x, spec)


def dense(x: Tensor, spec: DenseSpec, layers: Sequence[DenseTensors], norms: Sequence[Sequence[Normaliser]]) -> Tensor:
    """`Dense`; ``norms`` are, of each layer, that of its input and those inside."""
    for tensors, layer, (first, *inner) in zip(layers, spec.layers, norms, strict=True):
        u = torch.relu(normalised(x, tensors.norm, layer.norm, first)).to(x.dtype)
        u = _inner(u, tensors.convs, layer.layers, inner)
        x = torch.cat([x, convolved(u, tensors.convs[-1], layer.layers[-1])], 1)
    return x
