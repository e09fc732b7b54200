"""What a fused pass is told besides its tensors, as text: how a node of a graph carries it, from one process to the
next.

The text is a Python expression of constructors and constants, ``t(3)`` where the third tensor stands. It is read by
walking its syntax tree, never evaluated: nothing but the classes that were made `known` is constructed.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedres.activation import Activation, activation_told


class Untold(TypeError):
    """Something that a graph can not carry as text."""


_KNOWN: dict[str, Callable[..., Any]] = {}


def known(*classes: type) -> None:
    """Let instances of these named tuples and dataclasses be written and read by the names of their classes."""
    _KNOWN.update({cls.__name__.lstrip("_"): cls for cls in classes})


def text_of(value: Any, tensors: list[Tensor]) -> str:
    """The text of constants, tuples, and what is `known`; every tensor in it is added to ``tensors``, once.

    Raises:
        Untold: of anything else.
    """
    if isinstance(value, Tensor):
        place = next((i for i, tensor in enumerate(tensors) if tensor is value), len(tensors))
        if place == len(tensors):
            tensors.append(value)
        return f"t({place})"
    if value is None or type(value) in (bool, int, str, torch.dtype):
        return repr(value)
    if type(value) is float and math.isfinite(value):
        return repr(value)
    if isinstance(value, Activation):
        return f"act({', '.join(map(repr, (value.name, *value.numbers)))})"
    cls: Any = type(value)
    name = cls.__name__.lstrip("_")
    if cls in (tuple, list):
        return f"({''.join(text_of(part, tensors) + ', ' for part in value)})"
    if _KNOWN.get(name) is cls and isinstance(value, tuple):
        return f"{name}({', '.join(text_of(part, tensors) for part in value)})"
    if _KNOWN.get(name) is cls:
        # What is not compared is found again where it is read, tensors apart.
        parts = ((one.name, one.compare, getattr(value, one.name)) for one in dataclasses.fields(value))
        told = (f"{key}={text_of(part, tensors)}" for key, told, part in parts if told or isinstance(part, Tensor))
        return f"{name}({', '.join(told)})"
    raise Untold(f"value: expected constants and tensors that a graph can carry, got {value!r}")


def value_of(text: str, tensors: Sequence[Tensor] = ()) -> Any:
    """What `text_of` wrote, with these tensors.

    Raises:
        ValueError: it is no such text.
    """
    return _built(_parsed(text), tensors)


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"spec: expected the text of a fused pass, got {text!r}") from error


def _built(node: ast.expr, tensors: Sequence[Tensor]) -> Any:
    match node:
        case ast.Constant(value):
            return value
        case ast.UnaryOp(ast.USub(), ast.Constant(value)):
            return -value  # type: ignore[operator]
        case ast.Tuple(elements):
            return tuple([_built(element, tensors) for element in elements])
        case ast.Attribute(ast.Name("torch"), name) if isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        case ast.Call(ast.Name("t"), [ast.Constant(int(place))], []) if place < len(tensors):
            return tensors[place]
        case ast.Call(ast.Name("act"), [ast.Constant(str(name)), *numbers], []):
            return activation_told(name, tuple([_built(number, tensors) for number in numbers]))
        case ast.Call(ast.Name(name), args, keywords) if name in _KNOWN:
            named = {str(keyword.arg): _built(keyword.value, tensors) for keyword in keywords}
            return _KNOWN[name](*[_built(arg, tensors) for arg in args], **named)
    raise ValueError(f"spec: expected the text of a fused pass, got {ast.unparse(node)!r} in it")
