"""First contact with a device: a kernel that can not be started there must not end a training.

Whoever runs a fused pass that has a plain one to fall back on does so inside `attempt`. What the pass may write to is
copied before launches that have not been seen to work, and put back if one of them fails.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from fusedres.runtime import backends, switches
from fusedres.runtime.launch import LaunchFailed

T = TypeVar("T")


class Owner(Protocol):
    """Whose pass it is."""

    fused_name: str
    """Where it stands in the model that was fused."""

    fused_failure: str | None
    """Why it runs its plain forward from now on."""

    fused_choices: Mapping[str, str]
    """What ``"auto"`` took, and where that is from."""

    fused_reordered: tuple[int, ...] | None
    """Strides of the last gradient that arrived in another layout than channels_last, and was copied."""


class Contact:
    """A pass under way: whose it is, and how to undo what it wrote."""

    def __init__(self, owner: Owner, written: Callable[[], list[Tensor]], kernels: bool) -> None:
        self.owner = owner
        self._written = written if kernels else list
        self._before: list[tuple[Tensor, Tensor]] | None = None

    def prepare_for_failure(self) -> None:
        """Launches follow that have not been seen to work."""
        if self._before is None:
            self._before = [(tensor, tensor.detach().clone()) for tensor in self._written()]

    def undo(self) -> None:
        """Put back what the pass may have written to."""
        with torch.no_grad():
            for tensor, before in self._before or ():
                tensor.copy_(before)


_current = threading.local()


def current() -> Contact | None:
    """The innermost pass under way on this thread."""
    contact: Contact | None = getattr(_current, "contact", None)
    return contact


def owner() -> Owner | None:
    """Whose pass is under way on this thread."""
    contact = current()
    return None if contact is None else contact.owner


def prepare_for_failure() -> None:
    """Launches follow, on this thread, that have not been seen to work."""
    contact = current()
    if contact is not None:
        contact.prepare_for_failure()


def attempt(owner: Owner, written: Callable[[], list[Tensor]], run: Callable[[], T], *, kernels: bool) -> T | None:
    """``run()``; None, with everything as it was, where a kernel could not be started.

    Args:
        owner: is told of the failure.
        written: gives the tensors that the pass may write to.
        run: the pass.
        kernels: whether it launches any.

    Raises:
        LaunchFailed: where kernels were asked for, by ``backend("triton")`` or ``FUSEDRES_STRICT=1``.
    """
    outer, contact = current(), Contact(owner, written, kernels)
    _current.contact = contact
    try:
        return run()
    except LaunchFailed as failure:
        give_up(owner, failure)
        contact.undo()
        return None
    finally:
        _current.contact = outer


_log = logging.getLogger(__name__)
_warned: set[tuple[str, str]] = set()


def give_up(owner: Owner | None, failure: LaunchFailed) -> None:
    """Let ``owner`` run its plain forward from now on, with one warning for a kernel on a device; or raise.

    Raises:
        LaunchFailed: there is no owner, or nothing may be forgiven.
    """
    if owner is None or switches.STRICT or backends.current() == "triton":
        raise failure
    owner.fused_failure = str(failure)
    _log.warning("%s runs its plain modules: %s", owner.fused_name or type(owner).__name__, failure)
    if (failure.kernel, failure.device) not in _warned:
        _warned.add((failure.kernel, failure.device))
        warnings.warn(f"fusedres: {failure}; blocks that need it run their plain modules", stacklevel=2)
