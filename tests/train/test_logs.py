"""fusedres.train.logs: the table, the picture and TensorBoard's files hold the history."""

import csv
import struct
import sys

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from fusedres.train.logs import Epoch, Logs, draw, write_csv

HISTORY = [Epoch(i, 10 * i, 0.1, 2.0 / i, 0.9 / i, 2.5 / i, 0.95 / i, 0.5 / i, 100.0, 1.5, 300.0) for i in (1, 2, 3)]


def test_csv_holds_every_epoch_once(tmp_path):
    for history in (HISTORY, HISTORY[:2]):  # fewer rows, as after a training that was resumed
        write_csv(tmp_path / "log.csv", history)
        with (tmp_path / "log.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [Epoch(**{name: float(value) for name, value in row.items()}) for row in rows] == history
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def test_picture_has_the_curves(tmp_path):
    draw(tmp_path / "curves.png", HISTORY, "a title", "test")
    header = (tmp_path / "curves.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:24])
    assert width > 1000
    assert height > 300


def test_tensorboard_shows_the_history_without_what_a_resumed_training_does_again(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, steps in ((0, (10, 20, 30)), (20, (30, 40))):
        with Logs(tmp_path, "a title", 40, "test", tensorboard=True, start=start) as logs:
            for step in steps:
                logs.step(step, 1, 0.1, start + step / 100, 0.5, 100.0, 1)
            logs.epoch(HISTORY)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [(event.step, pytest.approx(event.value)) for event in events.Scalars("train/loss")]
    assert losses == [(10, 0.1), (20, 0.2), (30, 20.3), (40, 20.4)]
    assert [event.value for event in events.Scalars("test/error")][-1] == pytest.approx(0.95 / 3)


def test_without_tensorboard_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"tensorboard is not installed: pip install fusedres\[train\]"):
        Logs(tmp_path, "", 1, "test", tensorboard=True)


def test_ranks_that_do_not_write_are_still(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with Logs(None, "a title", 10, "test") as logs:
        logs.step(1, 1, 0.1, 1.0, 0.5, 100.0, 1)
        logs.epoch(HISTORY)
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []
