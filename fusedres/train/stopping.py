"""SIGINT and SIGTERM as a wish to stop, granted when the state is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Stopped", "Stopping", "stopping"]


class Stopped(Exception):
    """The training was asked to stop, and what it had is saved."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number

    @property
    def status(self) -> int:
        """The exit status by which shells know the signal."""
        return 128 + self.number


class Stopping:
    """``requested`` is the number of the signal that came, 0 before."""

    requested = 0


@contextmanager
def stopping(*, patient: bool) -> Iterator[Stopping]:
    """Note signals instead of dying of them. A second Ctrl-C interrupts at once, unless ``patient``: torchrun repeats
    to its processes what they have had from the terminal."""
    wish = Stopping()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if not patient and wish.requested == number == signal.SIGINT:
            raise KeyboardInterrupt
        wish.requested = number

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
