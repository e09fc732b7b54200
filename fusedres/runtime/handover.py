"""What is known of a tensor, from the pass that wrote it to whoever is given that very tensor next.

What is left belongs to the object and to its version: a hook that returns another tensor, a tensor detached by
checkpointing or gathered by parallelism, and one that was written to in place (as autograd does where it adds gradients
up) bring nothing along.
(Writes through ``.data`` are not counted by torch and, as for autograd, not seen here.)
"""

from typing import Generic, TypeVar

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fusedres.runtime.torch_private import version

Known = TypeVar("Known")


class Carried(Generic[Known]):
    """One kind of knowledge."""

    def __init__(self) -> None:
        # tensor -> (its version and shape when this was known, what is known); an entry dies with its tensor.
        self._entries: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def leave(self, tensor: Tensor, known: Known) -> None:
        """Leave what is known of ``tensor`` for the next."""
        if not tensor.is_inference():
            self._entries[tensor] = (version(tensor), tuple(tensor.shape), known)

    def take(self, tensor: Tensor) -> Known | None:
        """What is known of ``tensor``, unless it was written to since; taken once, not kept alive."""
        entry = self._entries.pop(tensor, None)
        if entry is None or tensor.is_inference() or entry[:2] != (version(tensor), tuple(tensor.shape)):
            return None
        known: Known = entry[2]
        return known
