"""Progress on the standard error: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress"]


@contextmanager
def progress(*, lines: int | None = None) -> Iterator[Callable[[str, int, int], None]]:
    """A function of words, what is done, and what is to be done in all.

    Args:
        lines: where there is no terminal, at most so many of all that is told are printed; all if None, none if 0.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        said: set[int] = set()

        def line(words: str, done: int, of: int) -> None:
            place = done if lines is None else done * lines // max(of, 1)
            if lines != 0 and place not in said:
                said.add(place)
                print(f"[{done}/{of}] {words}", file=sys.stderr, flush=True)

        yield line
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def moved(words: str, done: int, of: int) -> None:
            bar.update(task, completed=done, total=of, description=words)

        yield moved
