"""fusedres_cli.main: exit status, messages, and the picture of the demonstration."""

import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from fusedres.explain.compile_report import CompileOptions
from fusedres_cli.main import main


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
        (["nonsense"], "'nonsense' is no command"),
        (["demo", "--epochs", "0"], "expected a whole number of at least 1, got '0'"),
        (["demo", "--batch", "-5"], "expected a whole number of at least 1, got '-5'"),
        (["demo", "--threads", "two"], "expected a whole number of at least 1, got 'two'"),
        (["demo", "--seed", "x"], "--seed: expected a whole number of 64 bits, got 'x'"),
        (["demo", "--seed", str(2**64)], "--seed: expected a whole number of 64 bits, got '18446744073709551616'"),
        (["train", "--seed", str(2**64)], "--seed: expected a whole number of 64 bits"),
        (["study", "shattered", f"--seed={-(2**63) - 1}"], "--seed: expected a whole number of 64 bits"),
        (["demo", "--min-accuracy", "97"], "expected a fraction between 0 and 1, got '97'"),
        (["demo", "--min-accuracy", "nan"], "expected a fraction between 0 and 1, got 'nan'"),
        (["compile", "--jobs", "0"], "expected a whole number of at least 1, got '0'"),
        (["demo", "--schedule", "fastest"], "argument --schedule: invalid choice: 'fastest' (choose from"),
        (
            ["explain", "resnet18", "--dtype", "int8"],
            "--amp-dtype: invalid choice: 'int8' (choose from",
        ),
        (["explain", "resnet18", "--batch", "0"], "expected a whole number of at least 1, got '0'"),
        (["explain", "resnet18", "--size", "224"], "expected CxHxW, such as 3x224x224, got '224'"),
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
        (["--px", "7"], "px must be at least 8, the size of the original images, got 7"),
        (["--out", "picture.jpg"], "out must name a .png file"),
        (["--out", "/nonexistent/picture.png"], "out must name a file that can be written"),
    ],
)
def test_impossible_arguments_return_2_before_training(arguments, message, capsys):
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--targets", "sm_90,sm_1"], "targets: expected some of sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, gfx90a"),
        (["--targets", ""], "targets: expected some of"),
        (["--models", "resnet19"], "model: expected a name such as resnet18, "),
        (["--dtypes", "fp8"], "dtypes: expected some of bf16, fp16, fp32, got 'fp8'"),
        (["--csv", "report.csv"], "csv: expected together with --report"),
        (["--report", "--csv", "/nonexistent/report.csv"], "csv must lie in an existing folder"),
    ],
)
def test_impossible_arguments_return_2_before_compiling(arguments, message, capsys):
    pytest.importorskip("triton")
    assert main(["compile", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_compile_passes_its_options_on(monkeypatch):
    given = []
    monkeypatch.setattr("fusedres.explain.compile_report.run", lambda options: given.append(options) or 0)
    assert main(["compile"]) == 0
    assert main(["compile", "--report", "--targets", "sm_90,gfx942,sm_90", "--jobs", "3", "--csv", "r.csv"]) == 0
    assert given == [
        CompileOptions(),
        CompileOptions(report=True, targets=("sm_90", "gfx942"), jobs=3, csv=Path("r.csv")),
    ]


def test_compile_without_triton_returns_1_and_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("fusedres.compiler.targets.triton", None)
    assert main(["compile", "--report"]) == 1
    assert "pip install triton" in capsys.readouterr().err


def test_the_library_and_help_need_no_extra():
    extras = ("rich", "matplotlib", "sklearn", "torchvision", "timm", "llvmlite")
    code = f"import sys; sys.modules.update(dict.fromkeys({extras})); from fusedres_cli.main import main; main([])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "compile" in done.stdout


def test_missing_package_returns_1_and_names_the_extra(monkeypatch, capsys):
    for name in ("fusedres.train.demo", "fusedres.commands.demo"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.delattr(name, raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["demo"]) == 1
    assert "pip install fusedres[cli,models]" in capsys.readouterr().err


def test_demo_writes_the_picture_and_reports_both_twins(tmp_path):
    picture = tmp_path / "demo.png"
    arguments = ["--epochs", "1", "--batch", "128", "--px", "8", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "fusedres", "demo", *arguments, "--no-resnet50", "--out", str(picture)],
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
    printed = " ".join(done.stdout.split())
    for expected in ("plain loss", "test accuracy", "time per step", "saved for backward", str(picture)):
        assert expected in printed
    gain = re.search(r"lets ResNet-20 keep ([\d.]+) MB for backward instead of ([\d.]+),", printed)
    assert float(gain[1]) < 0.85 * float(gain[2])
    assert "On this machine, measured:" in printed and "predicted" not in printed


def test_demo_fails_when_the_accuracy_is_not_reached(tmp_path, capsys):
    arguments = ["--epochs", "1", "--batch", "512", "--px", "8", "--min-accuracy", "1", "--no-resnet50"]
    assert main(["demo", *arguments, "--out", str(tmp_path / "demo.png")]) == 1
    output = capsys.readouterr().out
    assert "FAILED: plain test accuracy" in output
    assert "FAILED: fused test accuracy" in output
