"""Exceptions that come at any moment of a step: at the calls where CPython looks for signals, or memory runs out."""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch

KINDS = (KeyboardInterrupt, torch.OutOfMemoryError, RuntimeError)


class Injection:
    """Raises an exception at the ``at``-th moment inside the ``with`` block, and counts the moments.

    A KeyboardInterrupt comes where CPython runs handlers of signals: when a function begins, and when one written in C
    has returned. Other exceptions come in place of a call of PyTorch.
    """

    def __init__(self, kind: type[BaseException], at: int | None = None) -> None:
        self.kind, self.at, self.count = kind, at, 0
        self.where = ""

    def __call__(self, frame: Any, event: str, function: Any) -> None:
        if frame.f_code.co_filename == __file__ or not self._comes(frame, event, function):
            return
        self.count += 1
        if self.count == self.at:
            self.where = f"{event} {frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
            sys.setprofile(None)
            raise self.kind("injected")

    def _comes(self, frame: Any, event: str, function: Any) -> bool:
        if issubclass(self.kind, Exception):
            return event == "c_call" and _is_of_torch(function)
        # Of a generator that is closed where nobody waits for it, Python ignores the exception.
        return event == "c_return" or (event == "call" and not frame.f_code.co_flags & inspect.CO_GENERATOR)

    def __enter__(self) -> "Injection":
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)


def _is_of_torch(function: Any) -> bool:
    owner = getattr(function, "__self__", None)
    return isinstance(owner, torch.Tensor) or "torch" in (getattr(function, "__module__", None) or "")


def moments(kind: type[BaseException], run: Callable[[], object]) -> int:
    """How many moments there are in ``run()``."""
    with Injection(kind) as injection:
        run()
    return injection.count
