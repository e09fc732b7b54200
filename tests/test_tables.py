"""fusedres.tables: what fits is printed in full, what does not is left out by column and said."""

import io
import itertools
import re

import pytest
from rich.console import Console

from fusedres.tables import Column, Fitted

NAMES = ["layer1.0 ... layer1.2, 3 alike", "fc"]
TABLE = Fitted(
    "A title that is longer than the narrowest of these tables is wide, which is folded like all words",
    [
        Column("", NAMES, words=True),
        Column("predicted ms", ["54.26", "1234.56"]),
        Column("MB (launches)", ["32.82 (15)", "8.70 (16)"]),
        Column("images/s at most", ["6,147", "14,734"], 2),
        Column("of eager [%]", ["100.00", "41.21"], 1),
        Column("why", ["because it is predicted to be fastest", "because"], 3, words=True),
    ],
)


def printed(table, width):
    file = io.StringIO()
    Console(file=file, width=width).print(table)
    return file.getvalue()


@pytest.mark.parametrize("width", range(58, 200, 7))
def test_no_digit_is_cut_at_any_width(width):
    text = printed(TABLE, width)
    assert max(map(len, text.splitlines())) <= width
    told = re.search(r"No room for (.*): COLUMNS", " ".join(text.split()))
    left = told[1].split(", ") if told else []
    assert left == [title for title in ("images/s at most", "of eager [%]", "why") if title in left]
    for column in TABLE.columns:
        lines = text.partition("No room")[0].splitlines()
        cells = [cell.strip() for line in lines for cell in line.split("│")]
        if column.title in left:
            assert not set(column.cells) & set(cells)
        elif not column.words:
            assert set(column.cells) <= set(cells), column.title
    if 80 <= width < 100:
        assert left


def test_columns_go_by_priority():
    orders = [
        re.findall("why|images|of eager", printed(TABLE, width).partition("No room")[2]) for width in range(50, 200)
    ]
    seen = [set(one) for one, _ in itertools.groupby(orders)]
    assert seen == [{"why", "images", "of eager"}, {"why", "images"}, {"why"}, set()]


def test_names_are_folded_at_spaces_and_in_full():
    for width in (60, 80, 160):
        rows = [line.split("│")[1].strip() for line in printed(TABLE, width).splitlines() if line.startswith("│")]
        assert " ".join(rows) == " ".join(NAMES) + " " * (" ".join(rows).count("  "))
