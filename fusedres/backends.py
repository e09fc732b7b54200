"""Which face of an op runs: the formula, or one call into the vendor's library where it has one."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

BACKENDS = {
    "native": "one library call (ATen, oneDNN, cuDNN) per op where one computes it, the formula elsewhere",
    "reference": "plain PyTorch, exactly the formula in each op's docstring",
}
DEFAULT = "native"

_chosen = threading.local()


def current() -> str:
    """Name of the backend that ops called from this thread use."""
    return getattr(_chosen, "name", DEFAULT)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every fused operation called inside the ``with`` block on the named backend.

    A backward pass uses the backend that its forward pass ran on, wherever it is called.

    Args:
        name: ``"native"`` (default everywhere) or ``"reference"``.

    Raises:
        ValueError: the name is not a backend of this installation.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {sorted(BACKENDS)}, got {name!r}")
    previous = current()
    _chosen.name = name
    try:
        yield
    finally:
        _chosen.name = previous
