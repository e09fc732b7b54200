"""The tensors of what a model gives: of a dict, a tuple, a dataclass, or of all of these inside of each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass

from torch import Tensor

__all__ = ["first_tensor", "tensors_in"]


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor of nested mappings, lists, tuples and dataclasses, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):  # of transformers' outputs too, which are dataclasses besides
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in(vars(value))


def first_tensor(output: object) -> Tensor:
    """What a model gives foremost, its logits where it classifies: the first of its tensors.

    Raises:
        ValueError: there is none.
    """
    found = next(tensors_in(output), None)
    if found is None:
        raise ValueError(f"model: expected one that gives a tensor, or several, got a {type(output).__name__}")
    return found
