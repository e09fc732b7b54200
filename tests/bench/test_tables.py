"""fusedres.bench.tables: figures for people."""

import pytest
from rich.console import Console

from fusedres.bench import tables
from fusedres.bench.rows import NOT_AVAILABLE, new_table
from tests.bench.tiny import row

ROWS = [
    row("eager", speedup=1.0, median_s=0.1), row(median_s=0.05), row("cudnn", status=NOT_AVAILABLE, median_s=None),
    row("eager", speedup=1.0, median_s=0.012345, dtype="bf16"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "digits", "unit", "text"),
    [(None, 3, 1.0, "-"), (1.2345, 3, 1.0, "1.23"), (123456.0, 4, 1.0, "123456"), (0.0123, 4, 1e-3, "12.3")],
)
def test_numbers(value, digits, unit, text):
    assert tables.number(value, digits, unit) == text


def test_a_csv_as_markdown(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    with new_table(path) as writer:
        writer.add(ROWS)
    assert tables.main([str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| ms a step | eager | fused | cudnn |",
        "|---|---|---|---|",
        "| resnet50, train, fp16, batch 256, 224 px | 100 | 50 (2.00x) | not available |",
        "| resnet50, train, bf16, batch 256, 224 px | 12.35 | - | - |",
    ]
    with pytest.raises(SystemExit):
        tables.main([str(tmp_path / "none.csv")])


def test_a_comparison_shows_figures_and_says_why_there_are_none(capsys):
    tables.print_comparison(Console(), [*ROWS[:2], row("cudnn", status=NOT_AVAILABLE, reason="needs a GPU")])
    printed = capsys.readouterr().out
    assert "resnet50, train, fp16, batch 256, 224 px" in printed
    assert "50 (50 - 60)" in printed
    assert "cudnn: not available: needs a GPU" in printed
