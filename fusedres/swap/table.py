"""The table of what was fused, what was not, and why."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from typing import Any, overload

COLUMNS = ("name", "kind", "fused", "schedule", "norms", "reason", "note")
DROPPED = {"schedule": 1, "kind": 2}
"""What a narrow terminal has no room for, the largest first."""
MOST_NAMES = 3
"""Of batch norms that are printed with one reason."""


@dataclass(frozen=True)
class Row:
    """One candidate.

    Attributes:
        name: of the module in the model.
        kind: of the plain module.
        fused: whether its next call takes the fused pass.
        schedule: the one asked for, None if not fused.
        reason: why it is not fused, empty if it is.
        note: what of it runs as it is, or costs time, although it is fused.
        norms: how many batch norms are in its passes.
    """

    name: str
    kind: str
    fused: bool
    schedule: str | None
    reason: str
    note: str = ""
    norms: int = 0

    def left(self, reason: str) -> "Row":
        """The same, not fused for a reason outside of the module."""
        return replace(self, fused=False, schedule=None, reason=reason, note="", norms=0)


@dataclass(frozen=True)
class Norm:
    """One batch norm.

    Attributes:
        name: in the model.
        where: the name of the fused module whose pass has it; None: it is in no pass.
        reason: why in none, and what to do; empty if it is in one.
        counted: whether it is one of images, which passes are made for.
    """

    name: str
    where: str | None
    reason: str = ""
    counted: bool = True


class Report(Sequence[Row]):
    """Rows, printable as a table.

    Attributes:
        rows: the candidates.
        norms: every batch norm of the model, in its order.
        remark: what holds for all rows.
    """

    def __init__(self, rows: Sequence[Row], norms: Sequence[Norm] = (), remark: str = "") -> None:
        self.rows = tuple(rows)
        self.norms = tuple(norms)
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
        """Counts, rows and batch norms, of types that JSON has."""
        fused, all_norms = self.norms_fused
        return {
            "fused": self.fused,
            "candidates": len(self.rows),
            "norms_fused": fused,
            "norms_counted": all_norms,
            "remark": self.remark,
            "rows": [asdict(row) for row in self.rows],
            "norms": [asdict(norm) for norm in self.norms],
        }

    @property
    def fused(self) -> int:
        """How many candidates take the fused pass."""
        return sum(row.fused for row in self.rows)

    @property
    def norms_fused(self) -> tuple[int, int]:
        """How many batch norms are in a fused pass, and of how many."""
        counted = [norm.where is not None for norm in self.norms if norm.counted]
        return sum(counted), len(counted)

    def _table(self) -> list[tuple[str, ...]]:
        """Titles and rows, without columns that have nothing in them."""
        cells = [
            (row.name or "(model)", row.kind, "yes" if row.fused else "no", row.schedule or "-", str(row.norms),
             row.reason, row.note)
            for row in self.rows
        ]  # fmt: skip
        kept = [i for i in range(len(COLUMNS)) if any(line[i] for line in cells)]
        return [tuple(line[i] for i in kept) for line in (COLUMNS, *cells)] if cells else []

    def _left(self) -> list[str]:
        """The batch norms in no pass, those with the same reason together."""
        alike: dict[str, list[str]] = {}
        for norm in self.norms:
            if norm.where is None:
                alike.setdefault(norm.reason, []).append(norm.name or "(model)")
        return [f"in no pass: {_listed(names)}: {reason}" for reason, names in alike.items()]

    def _sums(self) -> list[str]:
        remark = f"; {self.remark}" if self.remark else ""
        fused, counted = self.norms_fused
        return [
            f"{self.fused} of {len(self.rows)} candidates fused{remark}",
            f"{fused} of {counted} batch norms fused",
        ]

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        lines = [[escape(cell) for cell in line] for line in self._table()]
        head = "".join(f"<th>{cell}</th>" for line in lines[:1] for cell in line)
        rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines[1:])
        below = "<br>".join(map(escape, (*self._left(), *self._sums())))
        return f"<table><tr>{head}</tr>{rows}</table><p>{below}</p>"

    def __rich_console__(self, *_: object) -> Iterator[object]:
        """For `rich`: as wide as the terminal at most, long reasons folded in their column."""
        from rich.text import Text

        from fusedres.tables import Column, Fitted

        columns = [
            Column(title, cells, DROPPED.get(title, 0), words=True)
            for title, *cells in zip(*self._table(), strict=True)
        ]
        if columns:
            yield Fitted("", columns)
        yield Text("\n".join([*self._left(), *self._sums()]))

    def __str__(self) -> str:
        table = self._table()
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        ]
        return "\n".join([*lines, *self._left(), *self._sums()])


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
