"""The tensors of live modules, as the plain forward finds them."""

from torch import Tensor, nn

from fusedres.nn.tracing import is_plain
from fusedres.runtime.graphs import signed


class NotFusable(Exception):
    """Why a block is left alone."""


def tensor_of(name: str, module: nn.Module) -> Tensor | None:
    """A parameter or buffer, or what a wrapper computes in its place.

    Raises:
        NotFusable: it is of a class that computes in its own way.
    """
    tensor = getattr(module, name, None)
    if tensor is not None and not is_plain(tensor):
        raise NotFusable(f"{name} of a {type(module).__name__} is a {type(tensor).__name__}, not a plain tensor")
    return None if tensor is None else signed(tensor)
