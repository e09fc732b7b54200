"""The table of what was fused, what was not, and why."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from html import escape
from typing import Any, overload


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

    def left(self, reason: str) -> "Row":
        """The same, not fused for a reason outside of the module."""
        return replace(self, fused=False, schedule=None, reason=reason, note="")


class Report(Sequence[Row]):
    """Rows, printable as a table."""

    def __init__(self, rows: Sequence[Row], remark: str = "") -> None:
        self.rows = tuple(rows)
        self.remark = remark

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

    def to_dict(self) -> dict[str, Any]:
        """Counts and rows, of types that JSON has."""
        return {
            "fused": self.fused,
            "candidates": len(self.rows),
            "remark": self.remark,
            "rows": [asdict(row) for row in self.rows],
        }

    @property
    def fused(self) -> int:
        """How many candidates take the fused pass."""
        return sum(row.fused for row in self.rows)

    def _table(self) -> list[tuple[str, ...]]:
        return [tuple(field.name for field in fields(Row))] + [
            (row.name or "(model)", row.kind, "yes" if row.fused else "no", row.schedule or "-", row.reason, row.note)
            for row in self.rows
        ]

    def _sum(self) -> str:
        remark = f"; {self.remark}" if self.remark else ""
        return f"{self.fused} of {len(self.rows)} candidates fused{remark}"

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        head, *lines = ([escape(cell) for cell in line] for line in self._table())
        rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines)
        titles = "".join(f"<th>{cell}</th>" for cell in head)
        return f"<table><tr>{titles}</tr>{rows}</table><p>{self._sum()}</p>"

    def __str__(self) -> str:
        table = self._table()
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        ]
        return "\n".join([*lines, self._sum()])
