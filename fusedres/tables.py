"""Tables for a terminal: what does not fit its width is left out by column, by priority, and said; no digit is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.table import Table
from rich.text import Text

FOLDED = 24
"""Width of words below which they are not folded."""


@dataclass(frozen=True)
class Column:
    """A column of figures or of words.

    Attributes:
        title: over it.
        cells: one for each row.
        drop: where the table is too wide, the column with the largest goes first; those with 0 stay.
        words: whether it may be folded, as figures may not be.
    """

    title: str
    cells: Sequence[str]
    drop: int = 0
    words: bool = False


@dataclass(frozen=True)
class Fitted:
    """A table as wide as it is printed at most. A console that is no terminal is 80 wide, or as COLUMNS says."""

    title: str
    columns: Sequence[Column]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = list(self.columns)
        while (spare := _spare(shown, options.max_width)) < 0:
            first = max(shown, key=lambda column: column.drop)
            if not first.drop:
                break
            shown.remove(first)
        table = Table(title=Text(self.title), title_justify="left")
        for column in shown:
            width = _least(column)
            more = min(max(map(cell_len, (column.title, *column.cells))) - width, max(spare, 0))
            width, spare = width + more, spare - more
            justify: JustifyMethod = "left" if column.words else "right"
            table.add_column(Text(column.title), justify=justify, width=width, overflow="fold")
        for cells in zip(*(column.cells for column in shown), strict=True):
            table.add_row(*map(Text, cells))
        yield table
        left = [column.title for column in self.columns if column not in shown]
        if left:
            yield Text(f"No room for {', '.join(left)}: COLUMNS=200 shows them.")


def _spare(columns: Sequence[Column], width: int) -> int:
    # A border before each column and after the last, and a space on both sides.
    return width - 1 - sum(_least(column) + 3 for column in columns)


def _least(column: Column) -> int:
    """What a column needs: figures in one line, words and titles folded at spaces."""
    longest = max(map(cell_len, column.cells), default=0)
    if column.words:
        longest = max([min(longest, FOLDED)] + [cell_len(word) for cell in column.cells for word in cell.split()])
    return max([longest] + [cell_len(word) for word in column.title.split()])
