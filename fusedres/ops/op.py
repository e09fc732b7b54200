"""An op: one primitive under one contract, with as many faces as there are ways to compute it."""

import functools
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar, cast

from torch import Tensor

from fusedres.runtime import backends
from fusedres.runtime.launch import wants_kernels
from fusedres.traffic.weigh import fastest

P = ParamSpec("P")
T = TypeVar("T")


class Op(Generic[P, T]):
    """A primitive. Calling it runs the face that the current backend and the operands' device ask for.

    ``reference`` is the formula in plain PyTorch, on any device and floating-point dtype. A face registered with
    `triton` launches kernels; one registered with `native` computes the same by calls into a library. Both return
    ``NotImplemented`` for operands that they do not cover, and the next face runs instead. ``check`` takes the same
    operands, and refuses those that do not fit each other before any face sees them. ``weighed``: the library's calls
    run in place of kernels where they are predicted to be faster.
    """

    def __init__(
        self, reference: Callable[P, T], *, check: Callable[..., object] | None = None, weighed: bool = False
    ) -> None:
        functools.update_wrapper(self, reference)
        self.reference = reference
        self.check = check
        self.weighed = weighed
        self._triton: Callable[..., Any] | None = None
        self._native: Callable[..., Any] | None = None

    def triton(self, face: Callable[..., Any]) -> Callable[..., Any]:
        self._triton = face
        return face

    def native(self, face: Callable[..., Any]) -> Callable[..., Any]:
        self._native = face
        return face

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        if self.check is not None:
            self.check(*args, **kwargs)
        if self._triton is not None and wants_kernels(_first_tensor(args)) and not self._library_wins(args, kwargs):
            result = self._triton(*args, **kwargs)
            if result is not NotImplemented:
                return cast(T, result)
        if self._native is not None and backends.runs_native():
            result = self._native(*args, **kwargs)
            if result is not NotImplemented:
                return cast(T, result)
        return self.reference(*args, **kwargs)

    def _library_wins(self, args: Any, kwargs: Any) -> bool:
        if not self.weighed or self._triton is None or self._native is None:
            return False
        ways = {"kernels": self._triton, "library": self._native}
        return fastest(self, ways, *args, **kwargs) == "library"

    def __repr__(self) -> str:
        return f"<op {self.__name__}>"  # type: ignore[attr-defined]


def _first_tensor(operands: Any) -> Tensor:
    """The first tensor of nested tuples; every op's first operand holds one."""
    while not isinstance(operands, Tensor):
        operands = next(part for part in operands if isinstance(part, Tensor | tuple))
    return operands
