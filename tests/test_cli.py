"""fusedres.cli: exit status, messages, and the picture of the demonstration."""

import struct
import subprocess
import sys

import pytest

from fusedres.cli import main


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == "fusedres 0.1.0\n"


def test_no_command_prints_help_and_fails(capsys):
    assert main([]) == 2
    assert "demo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "invalid choice"),
        (["demo", "--epochs", "0"], "expected a whole number of at least 1, got '0'"),
        (["demo", "--batch", "-5"], "expected a whole number of at least 1, got '-5'"),
        (["demo", "--threads", "two"], "expected a whole number of at least 1, got 'two'"),
        (["demo", "--seed", "x"], "invalid int value"),
        (["demo", "--min-accuracy", "97"], "expected a fraction between 0 and 1, got '97'"),
        (["demo", "--min-accuracy", "nan"], "expected a fraction between 0 and 1, got 'nan'"),
    ],
)
def test_malformed_arguments_exit_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "1438"], "batch must be between 1 and 1437, got 1438"),
        (["--px", "7"], "size must be at least 8"),
        (["--schedule", "fastest"], "schedule: expected one of"),
        (["--out", "picture.jpg"], "out must name a .png file"),
        (["--out", "/nonexistent/picture.png"], "out must lie in an existing folder"),
    ],
)
def test_impossible_arguments_return_2_before_training(arguments, message, capsys):
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_missing_package_returns_1_and_names_the_extra(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "fusedres.train.demo", raising=False)
    monkeypatch.delattr("fusedres.train.demo", raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["demo"]) == 1
    assert "pip install fusedres[cli]" in capsys.readouterr().err


def test_demo_writes_the_picture_and_reports_both_twins(tmp_path):
    picture = tmp_path / "demo.png"
    arguments = ["--epochs", "1", "--batch", "128", "--px", "8", "--min-accuracy", "0", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "fusedres.cli", "demo", *arguments, "--no-resnet50", "--out", str(picture)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    header = picture.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:24])
    assert width > 600
    assert height > 300
    for expected in ("plain loss", "test accuracy", "time per step", "saved for backward", str(picture)):
        assert expected in done.stdout


def test_demo_fails_when_the_accuracy_is_not_reached(tmp_path, capsys):
    arguments = ["--epochs", "1", "--batch", "512", "--px", "8", "--min-accuracy", "1", "--no-resnet50"]
    assert main(["demo", *arguments, "--out", str(tmp_path / "demo.png")]) == 1
    output = capsys.readouterr().out
    assert "FAILED: plain test accuracy" in output
    assert "FAILED: fused test accuracy" in output
