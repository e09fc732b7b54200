"""fusedres.arguments: what can not be written is refused, and what is there stays as it is."""

import sys

import pytest

from fusedres.arguments import check_file, check_packages


def test_a_file_that_can_be_written_leaves_no_trace(tmp_path):
    check_file(tmp_path / "new.png", "out", ".png")
    (tmp_path / "old.png").write_bytes(b"kept")
    check_file(tmp_path / "old.png", "out", ".png")
    assert [path.name for path in tmp_path.iterdir()] == ["old.png"]
    assert (tmp_path / "old.png").read_bytes() == b"kept"
    check_file(None, "out", ".png")


def test_a_file_that_can_not_be_written_is_refused(tmp_path):
    (tmp_path / "folder.png").mkdir()
    for path in ("/nonexistent/picture.png", "/proc/picture.png", tmp_path / "folder.png"):
        with pytest.raises(ValueError, match=f"out must name a file that can be written, got {path}: "):
            check_file(type(tmp_path)(path), "out", ".png")
    with pytest.raises(ValueError, match=r"csv must name a .csv file, got .*rows.txt"):
        check_file(tmp_path / "rows.txt", "csv", ".csv")


def test_missing_packages_are_named_with_their_extra(monkeypatch):
    check_packages("torch")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"^matplotlib, nonsense not installed: pip install fusedres\[train\]$"):
        check_packages("torch", "matplotlib", "nonsense", extra="train")
