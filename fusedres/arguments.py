"""Arguments of commands: kinds of values, files that are written at the end, packages that are needed then."""

from __future__ import annotations

import argparse
import importlib.util
import math
from pathlib import Path


def names(text: str) -> tuple[str, ...]:
    """A list separated by commas, each name once."""
    return tuple(dict.fromkeys(text.split(",")))


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


def check_file(path: Path | None, name: str, suffix: str) -> None:
    """Refuse a file that could not be written at the end of a long run; an existing one stays as it is.

    Args:
        path: of the file, or None if none is to be written.
        name: of the option.
        suffix: the file's, such as ``".png"``.

    Raises:
        ValueError: naming the option.
    """
    if path is None:
        return
    if path.suffix.lower() != suffix:
        raise ValueError(f"{name} must name a {suffix} file, got {path}")
    existed = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise ValueError(f"{name} must name a file that can be written, got {path}: {error.strerror}") from error
    if not existed:
        path.unlink()


def check_packages(*names: str, extra: str = "cli") -> None:
    """Refuse to begin without packages that are needed at the end.

    Raises:
        ImportError: saying which extra to install.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} not installed: pip install fusedres[{extra}]")
