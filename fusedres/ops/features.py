"""The features of a dense block side by side in one buffer: outputs are put into place, gradients added there."""

from torch import Tensor

from .contract import check_activation, check_vector, per_channel
from .op import Op


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


def _add_feature_grad(into: Tensor, g: Tensor, p: Tensor) -> None:
    """into += p * g: what one consumer of a dense block's features sends to them, in place, rounded once.

    The rest of batch norm's gradient, q * (x - mean) + r, is linear in x, and x and mean are the same for every
    consumer of a feature map: only the sums of the q and of the r are kept, and `bn_backward_apply` adds the part of
    all consumers at once when the feature map's own layer takes its gradient. So x is not read here: of a layer's C
    input channels, two reads and a write are left.

    Args:
        into: (N, C, H, W) gradient of the features so far, a slice of a wider buffer.
        g: (N, C, H, W) gradient behind the consumer's ReLU.
        p: (C,) in the statistics dtype.
    """
    check_activation("into", into)
    check_vector("p", p, into.shape[1])
    into.addcmul_(g, per_channel(p))


add_feature_grad = Op(_add_feature_grad)
