"""Hooks that only look."""

from collections.abc import Callable
from typing import Any


class Bystander:
    """A forward hook that neither keeps nor changes what it is shown: blocks go on as if it were not there."""

    def __init__(self, hook: Callable[..., None]) -> None:
        self.hook = hook

    def __call__(self, *shown: Any) -> None:
        self.hook(*shown)
