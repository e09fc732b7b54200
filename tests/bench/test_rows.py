"""fusedres.bench.rows: the schema, and a file that is whole at any moment."""

import csv

import pytest

from fusedres.bench.rows import COLUMNS, REFUSED, new_table, read_rows
from tests.bench.tiny import row

SCHEMA = (
    "case,kind,mode,dtype,batch,px,contender,status,reason,images_per_s,speedup,median_s,low_s,high_s,rounds,"
    "first_step_s,error,bound,peak_bytes,saved_bytes_per_image,launches,declared_launches,declared_bytes,"
    "declared_flops,library_calls,declared_whole,flops,gb_per_s,tflop_per_s,roofline_s,of_roofline,peak_gb_per_s,peak_tflop_per_s,"
    "sm_mhz,memory_mhz,watts,celsius,device,processor,threads,driver,python,torch,triton,cuda,cudnn,fusedres,commit,"
    "date"
)


def test_the_schema():
    assert ",".join(COLUMNS) == SCHEMA


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "rows.csv"
    rows = [row("eager", speedup=1.0), row(reason='a "quoted", two\nlined reason', status=REFUSED, median_s=None)]
    with new_table(path) as writer:
        writer.add(rows)
    assert read_rows(path) == rows
    assert list(csv.DictReader(path.open()))[1]["median_s"] == ""


def test_rows_are_in_the_file_as_soon_as_they_are_added(tmp_path):
    path = tmp_path / "rows.csv"
    with new_table(path, [row("eager")]) as writer:
        writer.add([row()])
        assert [one.contender for one in read_rows(path)] == ["eager", "fused"]


def test_a_last_line_that_was_cut_short_is_left_out(tmp_path):
    path = tmp_path / "rows.csv"
    with new_table(path) as writer:
        writer.add([row("eager"), row()])
    path.write_text(path.read_text()[:-120])
    assert [one.contender for one in read_rows(path)] == ["eager"]


def test_other_columns_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected the columns of this version"):
        read_rows(path)
