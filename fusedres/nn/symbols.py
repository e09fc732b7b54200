"""What stands for tensors in a forward that is read."""

from __future__ import annotations

import dis
import inspect
import operator
import os
from collections.abc import Callable
from types import FrameType
from typing import Any, cast

import torch
from torch import fx

_TORCH = os.path.dirname(torch.__file__)


class Symbol(fx.Proxy):
    """A tensor in a forward that is read; it says that it is none, since PyTorch's C++ would look into one."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # Read by isinstance, of whoever is told something else than of a tensor.
        frame = inspect.currentframe()
        if frame is not None and frame.f_back is not None and _asks_for_class(frame.f_back):
            reader: Any = self.tracer
            reader.asks_for_classes = True
        return type(self)

    def _in_place(self, function: Callable[..., Any], other: Any) -> Symbol:
        return cast(Symbol, self.tracer.create_proxy("call_function", function, (self, other), {}))

    def __iadd__(self, other: Any) -> Symbol:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> Symbol:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> Symbol:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> Symbol:
        return self._in_place(operator.itruediv, other)

    def chunk(self, chunks: Any, dim: Any = 0) -> Any:
        return _pieces(self.tracer.create_proxy("call_method", "chunk", (self, chunks, dim), {}), chunks)

    def split(self, split_size: Any, dim: Any = 0) -> Any:
        return _pieces(self.tracer.create_proxy("call_method", "split", (self, split_size, dim), {}), split_size)


def _asks_for_class(frame: FrameType) -> bool:
    """Whether code that is not PyTorch's is in a call of isinstance or is_tensor."""
    code = frame.f_code
    if code.co_filename.startswith(_TORCH):
        return code.co_name == "is_tensor"
    if "isinstance" not in code.co_names:
        return False
    done = [step for step in dis.get_instructions(code) if step.offset <= frame.f_lasti]
    for step in reversed(done[:-1]):
        if step.argval == "isinstance" or (step.opname.startswith("CALL") and step.offset != done[-1].offset):
            return bool(step.argval == "isinstance")
    return False


def _pieces(pieces: Any, of: Any) -> Any:
    """What `chunk` or `split` gives, as a tuple where its length is told by what they were given."""
    if isinstance(of, int) and pieces.node.target == "chunk":
        return tuple(pieces[i] for i in range(of))
    if isinstance(of, list | tuple):
        return tuple(pieces[i] for i in range(len(of)))
    return pieces
