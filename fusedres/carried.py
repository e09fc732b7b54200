"""What is known of a tensor, from the pass that wrote it to whoever is given that very tensor next.

Three things are left this way, whatever lies between: the statistics of a sum, for the batch norm that follows; the end
of a block, for the block behind it; and, on the way back, the sums of a gradient that its batch norm needs. They belong
to the object and to its version: a hook that returns another tensor, a tensor detached by checkpointing or gathered by
parallelism, and one that was written to in place (as autograd does where it adds gradients up) bring nothing along.
(Writes through ``.data`` are not counted by torch and, as for autograd, not seen here.)
"""

from typing import Generic, TypeVar

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .ops.bn_backward import NormSums
from .ops.contract import Partials, Producer

Known = TypeVar("Known")


class Carried(Generic[Known]):
    """One kind of knowledge."""

    def __init__(self) -> None:
        # tensor -> (its version and shape when this was known, what is known); an entry dies with its tensor.
        self._entries: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def leave(self, tensor: Tensor, known: Known) -> None:
        """Leave what is known of ``tensor`` for the next."""
        if not tensor.is_inference():
            self._entries[tensor] = (tensor._version, tuple(tensor.shape), known)

    def take(self, tensor: Tensor) -> Known | None:
        """What is known of ``tensor``, unless it was written to since; taken once, not kept alive."""
        entry = self._entries.pop(tensor, None)
        if entry is None or tensor.is_inference() or entry[:2] != (tensor._version, tuple(tensor.shape)):
            return None
        known: Known = entry[2]
        return known


statistics: Carried[Partials] = Carried()
"""Of a block's output: what a block that ends without a batch norm measured as it wrote it."""

ends: Carried[Producer] = Carried()
"""Of a block's output: the batch norm before its sum and its ReLU, in a network that hands it over."""

reduced: Carried[NormSums] = Carried()
"""Of a gradient at a block's output, already behind its ReLU: the sums that the batch norm there needs."""
