"""Entries of a module's own dictionary that a forward may be told by."""

from __future__ import annotations

from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch


class Unreadable(Exception):
    """Why a forward can not be read."""


CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.memory_format, Enum, torch.Size)
FUNCTIONS = (FunctionType, BuiltinFunctionType, type)


def is_constant(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(is_constant, value))
    if isinstance(value, dict):
        return all(is_constant(key) and is_constant(each) for key, each in value.items())
    return isinstance(value, CONSTANTS)


def copied(value: Any) -> Any:
    """A constant that nobody else writes to."""
    if isinstance(value, list):
        return [copied(each) for each in value]
    if isinstance(value, dict):
        return {key: copied(each) for key, each in value.items()}
    return value


def copied_setting(name: str, value: Any) -> Any:
    """An entry of a module's dictionary for a twin of it, which is to lead to no live module.

    Raises:
        Unreadable: it might.
    """
    if is_constant(value):
        return copied(value)
    alone = isinstance(value, FUNCTIONS) and getattr(value, "__closure__", None) is None
    if not alone or name in _METHODS:
        raise Unreadable(f"{name} is a {type(value).__name__}")
    return value


_METHODS = ("forward", "_conv_forward", "_call_impl", "_wrapped_call_impl")
