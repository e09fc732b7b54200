"""The statistics of a tensor, from the pass that wrote it to the batch norm that follows, whatever lies between.

A fused block that ends without a batch norm leaves the statistics of its output here, and whichever block, dense layer
or batch norm is given that very tensor next takes them, instead of reading the tensor once more. They belong to the
object and to its version: a hook that returns another tensor, a tensor detached by checkpointing or gathered by
parallelism, and one that was written to in place are measured again. (Writes through ``.data`` are not counted by torch
and, as for autograd, not seen here.)
"""

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .ops.contract import Partials

_carried: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""tensor -> (its version and shape when it was measured, its statistics); an entry dies with its tensor."""


def carry(tensor: Tensor, partials: Partials) -> None:
    """Leave the statistics of ``tensor`` for whoever normalises it next."""
    if not tensor.is_inference():
        _carried[tensor] = (tensor._version, tuple(tensor.shape), partials)


def carried(tensor: Tensor) -> Partials | None:
    """The statistics of ``tensor``, if it was measured and not written to since; taken once, not kept alive."""
    known = _carried.pop(tensor, None)
    if known is None or tensor.is_inference() or known[:2] != (tensor._version, tuple(tensor.shape)):
        return None
    partials: Partials = known[2]
    return partials
