"""`fusedres explain`: what it prints, draws and refuses."""

import ast
import json
import struct
import sys
from pathlib import Path

import pytest

from fusedres import ops
from fusedres.traffic.aten import KINDS
from fusedres_cli.main import main

pytest.importorskip("torchvision")
pytest.importorskip("rich")

SMALL = ["explain", "cifar_resnet20", "--batch", "8"]


def test_tables(capsys):
    assert main([*SMALL, "--gpu", "a100", "--rung", "prologue,auto"]) == 0
    printed = capsys.readouterr().out
    assert "cifar_resnet20, training step, batch 8, bf16, 3 x 32 x 32, a100; per image" in printed
    for expected in (
        "eager",
        "prologue",
        "layer1.0",
        "conv_forward_kernel",
        "auto: the choice of each layer",
        "on a100",
    ):
        assert expected in printed
    assert "block_end" not in printed.split("auto: the choice")[0]


def test_json_is_all_that_is_printed(capsys):
    assert main([*SMALL, "--rung", "stats", "--dtype", "fp32", "--infer", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["mode"] == "inference"
    assert answer["dtype"] == "fp32"
    assert list(answer["rungs"]) == ["stats"]
    assert answer["size"] == [3, 32, 32]


def test_the_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / "explained.png"
    assert main([*SMALL, "--rung", "prologue", "--out", str(file)]) == 0
    assert str(file) in capsys.readouterr().out
    header = file.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:24])
    assert width > 1000 and height > 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet500"], "model: expected a name such as resnet50"),
        (["resnet18", "--gpu", "rtx409"], "gpu: expected a name such as rtx4090"),
        (["resnet18", "--rung", "moment"], "rung: expected all or one of"),
        (["resnet18", "--batch", "300000", "--rung", "auto"], "layer stem: "),
        (["alexnet"], "nothing to fuse in it"),
        (["resnet18", "--out", "picture.pdf"], "plot must name a .png file"),
        (["resnet18", "--out", "/nonexistent/picture.png"], "plot must name a file that can be written"),
        (
            ["resnet18", "--out", "/proc/picture.png"],
            "plot must name a file that can be written, got /proc",
        ),
    ],
)
def test_wrong_arguments_return_2(arguments, message, capsys):
    assert main(["explain", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_a_file_that_fails_returns_2_in_one_line(tmp_path, capsys):
    file = tmp_path / "mods.py"
    file.write_text("def f():\n    raise OSError('no weights')\n")
    assert main(["explain", f"{file}:f"]) == 2
    assert capsys.readouterr().err == f"fusedres explain: error: model: {file}:f failed: OSError: no weights\n"


def test_a_picture_without_matplotlib_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*SMALL, "--out", str(tmp_path / "explained.png")]) == 1
    printed = capsys.readouterr()
    assert "matplotlib not installed: pip install fusedres[cli]" in printed.err
    assert printed.out == ""


def test_every_launch_says_its_kind_of_work():
    calls = [
        node
        for file in Path(ops.__path__[0]).glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("launch", "launch_rows", "launch_reduction")
    ]
    assert len(calls) > 12
    for call in calls:
        (kind,) = [keyword.value for keyword in call.keywords if keyword.arg == "kind"]
        assert isinstance(kind, ast.Name) or kind.value in set(KINDS) - {"other"}
