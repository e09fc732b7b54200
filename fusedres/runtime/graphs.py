"""Whether calls on this thread are followed by a compiler, in whose graph a fused pass is to be a node of its own."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from fusedres.context import context, here
from fusedres.runtime.launch import wants_kernels
from fusedres.runtime.torch_private import COMPILERS_TENSORS, constant_to_compilers, tree_leaves

P = ParamSpec("P")
T = TypeVar("T")


def is_graphed(x: Any) -> bool:
    """Whether a call on ``x`` is to leave a node in a compiler's graph, which runs the pass later.

    So it is in the part of a compiled program that `nn.in_graph` hands to the compiler, and under `torch.export`.
    """
    return isinstance(x, COMPILERS_TENSORS) and is_compiled_now()


def is_compiled_now() -> bool:
    """Whether a compiler has called what runs on this thread."""
    told = here().graphed
    return torch.compiler.is_compiling() if told is None else told


def signed(x: Tensor) -> Tensor:
    """A tensor whose sign is in its memory, as kernels read it; no call that a graph would hold, where it was."""
    return x.resolve_neg() if x.is_neg() else x


def launches(x: Any) -> bool:
    """Whether a pass that is called on ``x`` launches kernels before it returns."""
    return wants_kernels(x) and not x.is_meta and not is_graphed(x)


def size_hint(size: Any) -> int:
    """A size as a number: of one that varies the example that was compiled for, without tying the graph to it."""
    if isinstance(size, int):
        return size
    hint: int | None = size.node.hint if size.node.has_hint() else None
    return 1 if hint is None else hint


def one_call(function: Callable[P, T]) -> Callable[P, T]:
    """A function of tensors and constants as one call in the graph of Dynamo, which does not go through its code."""
    _functions[function.__name__] = function

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_dynamo_compiling():
            _handed_over()
            given: T = _called(function.__name__, args, kwargs)
            return given
        return function(*args, **kwargs)

    return called


_functions: dict[str, Callable[..., Any]] = {}


@constant_to_compilers
def _handed_over() -> None:
    # Not before somebody compiles: it imports the compiler.
    torch.compiler.allow_in_graph(_called)


def _called(name: str, args: Any, kwargs: Any) -> Any:
    with context(graphed=is_followed(args, kwargs)):
        return _functions[name](*args, **kwargs)


def is_followed(*arguments: Any) -> bool:
    """Whether some tensor in nested arguments is a compiler's."""
    return any(isinstance(one, COMPILERS_TENSORS) for one in tree_leaves(arguments))
