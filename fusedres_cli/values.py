"""Kinds of values, as `argparse` takes them: functions of a text that raise `argparse.ArgumentTypeError`."""

from __future__ import annotations

import argparse
import math

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""PyTorch's name of each, which is taken as well."""


def dtype(text: str) -> str:
    """A dtype by our name of it; what is none is for ``choices`` to refuse."""
    return {theirs: ours for ours, theirs in DTYPES.items()}.get(text, text)


def names(text: str) -> tuple[str, ...]:
    """A list separated by commas, each name once."""
    return tuple(dict.fromkeys(text.split(",")))


def dtypes(text: str) -> tuple[str, ...]:
    """A list of dtypes."""
    return tuple(dict.fromkeys(map(dtype, names(text))))


def batches(text: str) -> tuple[int, ...]:
    """A list of whole numbers of at least 1."""
    return tuple(positive(part) for part in text.split(","))


def size(text: str) -> tuple[int, int, int]:
    """Channels, height and width of an image, such as 3x224x224."""
    numbers = tuple(int(part) if part.isdecimal() else 0 for part in text.split("x"))
    if len(numbers) != 3 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected CxHxW, such as 3x224x224, got {text!r}")
    return numbers[0], numbers[1], numbers[2]


def whole(text: str) -> int:
    """A whole number of at least 0."""
    return _whole(text, 0)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1)


def _whole(text: str, least: int) -> int:
    value = int(text) if text.lstrip("+").isdecimal() else -1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return value


def seed(text: str) -> int:
    """What PyTorch's generators take."""
    try:
        value = int(text)
    except ValueError:
        value = 2**64
    if not -(2**63) <= value < 2**64:
        raise argparse.ArgumentTypeError(f"expected a whole number of 64 bits, got {text!r}")
    return value


def amount(text: str) -> float:
    """A finite number of at least 0."""
    return _number(text, math.inf, "a number of at least 0")


def fraction(text: str) -> float:
    """A number between 0 and 1."""
    return _number(text, math.nextafter(1.0, 2.0), "a fraction between 0 and 1")


def _number(text: str, below: float, expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < below:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value
