"""The features of a dense block side by side in one buffer: outputs are put into place, gradients added there."""

from typing import NamedTuple

import torch
from torch import Tensor

from fusedres.ops.checks import check_activation, check_vector
from fusedres.ops.op import Op
from fusedres.ops.rows import per_channel


def _put_features(buffer: Tensor, y: Tensor, first: int) -> None:
    """buffer[:, first : first + K] = y, in place of a concatenation.

    Reads and writes K channels, whatever the buffer holds already; a convolution that wrote its rows with the stride
    of the buffer's pixels would spare that too.

    Args:
        buffer: (N, C, H, W) channels_last.
        y: (N, K, H, W).
        first: its channel in the buffer.
    """
    check_activation("buffer", buffer)
    check_activation("y", y)
    if first < 0 or first + y.shape[1] > buffer.shape[1]:
        raise ValueError(f"first: expected {y.shape[1]} channels within {buffer.shape[1]}, got them at {first}")
    buffer[:, first : first + y.shape[1]].copy_(y)


put_features = Op(_put_features)


class FeatureGrads(NamedTuple):
    """Where one consumer of a dense block's features adds its part of their gradient: ``into`` = ``before`` + part.

    Both are (N, C, H, W) of the C channels that it consumes, slices of wider buffers, and may be the same tensor.
    """

    before: Tensor
    into: Tensor


def _add_feature_grad(features: FeatureGrads, g: Tensor, p: Tensor) -> None:
    """into = before + p * g: what one consumer of a dense block's features sends to them, rounded once.

    The rest of batch norm's gradient, q * (x - mean) + r, is linear in x, and x and mean are the same for every
    consumer of a feature map: only the sums of the q and of the r are kept, and `bn_backward_apply` adds the part of
    all consumers at once when the feature map's own layer takes its gradient. So x is not read here: of a layer's C
    input channels, two reads and a write are left.

    Args:
        features: (N, C, H, W) each, of one dtype.
        g: (N, C, H, W) gradient behind the consumer's activation.
        p: (C,) in the statistics dtype.
    """
    check_features(features, g.shape)
    check_vector("p", p, g.shape[1])
    torch.addcmul(features.before, g, per_channel(p), out=features.into)


def check_features(features: FeatureGrads, size: tuple[int, ...]) -> None:
    """Refuse tensors that are not of ``size``, or not of one dtype."""
    for name, tensor in features._asdict().items():
        check_activation(name, tensor)
        if tensor.shape != size:
            raise ValueError(f"{name}: expected shape {tuple(size)}, got {tuple(tensor.shape)}")
    if features.into.dtype != features.before.dtype:
        raise TypeError(f"into: expected the dtype of before, {features.before.dtype}, got {features.into.dtype}")


add_feature_grad = Op(_add_feature_grad)
