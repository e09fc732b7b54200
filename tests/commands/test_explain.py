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


def test_the_answer_comes_first_and_one_table_after_it(capsys):
    asked = [*SMALL, "--gpu", "a100", "--rung", "prologue,auto"]
    assert main([*asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    eager, auto = told["eager"], told["rungs"]["auto"]
    assert main(asked) == 0
    printed = capsys.readouterr().out
    fewer = 1 - auto["bytes_per_image"] / eager["bytes_per_image"]
    sentence = (
        f"On an a100, batch 8: predicted {auto['predicted_ms']:.3g} ms a step with auto, "
        f"{eager['predicted_ms'] / auto['predicted_ms']:.2f} x eager; {100 * fewer:.0f} % fewer bytes; "
        f"{auto['saved_bytes_per_image'] / 1e6:.3g} MB instead of {eager['saved_bytes_per_image'] / 1e6:.3g} saved per "
        "image. cifar_resnet20, training step, batch 8, bf16, 3 x 32 x 32, a100; per image"
    )
    assert " ".join(printed.split()).startswith(sentence)
    assert max(map(len, printed.splitlines())) <= 80
    assert printed.count("┏") == 1 and "block_end" not in printed and "layer1.0" not in printed
    assert "--by layer" in printed


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        (["layer"], ["layer1.0", "auto: the choice of each layer"]),
        (["kernel"], ["conv_forward_kernel", "prologue: MB per image by kernel"]),
        (["kind", "kernel"], ["batch norm", "add and ReLU", "conv_forward_kernel"]),
    ],
)
def test_the_rest_is_shown_where_it_is_asked_for(by, expected, capsys):
    assert main([*SMALL, "--rung", "auto,prologue", *(word for one in by for word in ("--by", one))]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert all(words in printed for words in expected) and "--by layer" not in printed
    others = {"layer1.0", "conv_forward_kernel", "add and ReLU"} - set(expected)
    assert not any(words in printed for words in others)


def test_inference_is_compared_with_a_model_that_has_the_dtype_itself(capsys):
    asked = [*SMALL, "--infer", "--rung", "prologue"]
    assert main([*asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    cast = told["served_cast"]
    assert not told["cast"] and cast["cast"] and cast["eager"]["launches"] < told["eager"]["launches"]
    assert main(asked) == 0
    printed = capsys.readouterr().out
    gain = cast["eager"]["predicted_ms"] / cast["rungs"]["prologue"]["predicted_ms"]
    assert f"under autocast; cast to bf16, {cast['rungs']['prologue']['predicted_ms']:.3g} ms, {gain:.2f} x eager;" in (
        " ".join(printed.split())
    )
    assert "│ prologue, cast" in printed and "│ eager, cast" in printed and "MB saved" not in printed
    for asked_else in ([*asked, "--cast"], [*asked, "--dtype", "fp32"]):
        assert main([*asked_else, "--json"]) == 0
        assert "served_cast" not in json.loads(capsys.readouterr().out)


def test_the_size_of_images_is_asked_for_by_one_option(capsys):
    assert main([*SMALL, "--rung", "stats", "--px", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["size"] == [3, 64, 64]
    assert main([*SMALL, "--px", "64", "--size", "3x64x64"]) == 2
    assert "px: expected instead of --size" in capsys.readouterr().err
    assert main(["explain"]) == 2
    assert "model: expected one to explain" in capsys.readouterr().err


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
