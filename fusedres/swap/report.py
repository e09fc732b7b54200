"""The table of what was fused, what was not, and why."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import overload


@dataclass(frozen=True)
class Row:
    """One candidate.

    Attributes:
        name: of the module in the model.
        kind: of the plain module.
        fused: whether its next call takes the fused pass.
        schedule: the one asked for, None if not fused.
        reason: why it is not fused, empty if it is.
        note: what costs time although it is fused.
    """

    name: str
    kind: str
    fused: bool
    schedule: str | None
    reason: str
    note: str = ""


class Report(Sequence[Row]):
    """Rows, printable as a table."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = tuple(rows)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        return self.rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __str__(self) -> str:
        head = tuple(field.name for field in fields(Row))
        table = [head] + [
            (row.name or "(model)", row.kind, "yes" if row.fused else "no", row.schedule or "-", row.reason, row.note)
            for row in self.rows
        ]
        widths = [max(len(line[column]) for line in table) for column in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        ]
        fused = sum(row.fused for row in self.rows)
        return "\n".join([*lines, f"{fused} of {len(self.rows)} candidates fused"])
