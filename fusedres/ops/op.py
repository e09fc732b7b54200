"""An op: one primitive under one contract, with as many faces as there are ways to compute it."""

import functools
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar, cast

from .. import backends

P = ParamSpec("P")
T = TypeVar("T")


class Op(Generic[P, T]):
    """A primitive. Calling it runs the face that the current backend asks for.

    ``reference`` is the formula in plain PyTorch, on any device and floating-point dtype. A face registered with
    `native` computes the same by calls into a library; it returns ``NotImplemented`` for operands that the
    library has no call for, and the reference runs instead.
    """

    def __init__(self, reference: Callable[P, T]) -> None:
        functools.update_wrapper(self, reference)
        self.reference = reference
        self._native: Callable[..., Any] | None = None

    def native(self, face: Callable[..., Any]) -> Callable[..., Any]:
        self._native = face
        return face

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        if self._native is not None and backends.current() == "native":
            result = self._native(*args, **kwargs)
            if result is not NotImplemented:
                return cast(T, result)
        return self.reference(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<op {self.__name__}>"  # type: ignore[attr-defined]
