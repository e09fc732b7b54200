"""fusedres.commands.model_names: the commands that take models take the same names, or say in one line why not."""

import csv
import json
import subprocess
import sys

import pytest

from fusedres.bench.gate import Gate, Verdict
from fusedres.explain import binaries, compile_report
from fusedres.explain.binaries import Outcome
from fusedres_cli.main import main
from fusedres_cli.options import RULE

pytest.importorskip("torchvision")
pytest.importorskip("timm")
pytest.importorskip("transformers")

SEGMENTATION, DETECTION = "torchvision.fcn_resnet50", "torchvision.fasterrcnn_resnet50_fpn"
CLASS = """
from torch import nn
from torchvision.models.resnet import BasicBlock

class Net(nn.Module):
    def __init__(self, num_classes=5):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block = BasicBlock(16, 16)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x):
        x = self.block(self.stem(x))
        return {"logits": self.fc(x.mean((2, 3))), "features": [x]}
"""
SMALL = ["--option", "depths=[1,1]", "--option", "hidden_sizes=[16,32]", "--option", "embedding_size=16"]


@pytest.fixture
def mine(tmp_path):
    """A class in a file, which gives its logits in a dict."""
    file = tmp_path / "mine.py"
    file.write_text(CLASS)
    return f"{file}:Net"


@pytest.fixture
def named(mine):
    return lambda name: mine if name == "a class" else name


MODELS = (SEGMENTATION, "timm.resnet18", "a class", "hf.resnet")


@pytest.mark.parametrize("command", ["explain", "bench", "train", "compile", "doctor"])
def test_the_help_of_every_command_says_the_rule(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert RULE in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("name", "candidates"),
    [(SEGMENTATION, 16), (DETECTION, 16), ("timm.resnet18", 9), ("a class", 1), ("hf.resnet", 0),
     ("torchvision.r3d_18", 0)],
)  # fmt: skip
def test_doctor_reports_on_models_of_every_task(name, candidates, named, capsys, monkeypatch):
    monkeypatch.setattr(Gate, "judge", lambda *_: Verdict())
    assert main(["doctor", named(name)]) == 0
    fused, _, every = capsys.readouterr().out.splitlines()[-1].split()[:3]
    assert int(every) >= int(fused) >= candidates


@pytest.mark.parametrize("name", MODELS)
def test_explain_counts_a_step_of_each(name, named, capsys, monkeypatch):
    # Whatever of it is fused: what eager PyTorch does is counted all the same.
    monkeypatch.setattr("fusedres.explain.step.why_not_fused", lambda _: None)
    arguments = ["--batch", "2", "--size", "3x64x64", "--rung", "stats", "--json"]
    assert main(["explain", named(name), *arguments]) == 0
    answer = json.loads(capsys.readouterr().out)
    # GFLOP of the contractions of a training step, forward and backward, where the images need no gradient.
    expected = {SEGMENTATION: 12.953, "timm.resnet18": 0.869, "a class": 0.1203, "hf.resnet": 2.0}[name]
    assert answer["eager"]["flops_per_image"] / 1e9 == pytest.approx(expected, rel=0.02)
    assert answer["rungs"]["stats"]["launches"] <= answer["eager"]["launches"]


def test_a_loss_of_several_outputs_goes_through_all_of_them(mine, capsys):
    arguments = ["--batch", "2", "--size", "3x8x8", "--rung", "stats", "--dtype", "fp32", "--json"]
    assert main(["explain", mine, *arguments]) == 0
    layers = {layer["name"]: layer for layer in json.loads(capsys.readouterr().out)["layers"]}
    pixels, inside, wide, classes = 2 * 64, 3 * 9, 16, 5
    # Forward, and of the weight alone (the stem) or of the input too (the classifier).
    assert layers["stem"]["eager"]["flops_per_image"] == pytest.approx(2 * 2 * pixels * inside * wide / 2, rel=0.01)
    assert layers["fc"]["eager"]["flops_per_image"] == pytest.approx(3 * 2 * wide * classes, rel=0.2)


@pytest.mark.parametrize(
    ("name", "modes"),
    [
        pytest.param(SEGMENTATION, ["infer"], marks=pytest.mark.slow),
        ("timm.resnet18", ["infer"]),
        ("a class", ["train", "infer"]),
        ("hf.resnet", ["infer"]),
    ],
)
def test_bench_measures_each(name, modes, named, tmp_path):
    file = tmp_path / "rows.csv"
    arguments = ["--px", "32", "--batch", "1", "--contenders", "eager,fused", "--rounds", "1", "--csv", str(file)]
    assert main(["bench", "--model", named(name), *(f"--{mode}" for mode in modes), *arguments]) == 0
    with file.open() as table:
        rows = list(csv.DictReader(table))
    assert [(row["mode"], row["contender"]) for row in rows] == [
        (mode, contender) for mode in modes for contender in ("eager", "fused")
    ]
    measured = [row for row in rows if row["contender"] == "eager" or name != "hf.resnet"]
    assert all(row["status"] == "ok" and float(row["median_s"]) > 0 and float(row["error"]) < 1e-4 for row in measured)


@pytest.mark.parametrize(("name", "options"), [("timm.resnet10t", []), ("a class", []), ("hf.resnet", SMALL)])
def test_train_takes_a_step_of_each_classifier(name, options, named, tmp_path, capsys):
    folder = tmp_path / "run"
    arguments = ["--iterations", "1", "--batch", "4", "--px", "8", "--out", str(folder), *options]
    assert main(["train", "--model", named(name), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "epoch    1  step      1" in printed
    assert (folder / "model.pt").stat().st_size > 1000


@pytest.mark.parametrize("name", [SEGMENTATION, "timm.resnet18", "a class", "hf.resnet"])
def test_compile_records_what_each_launches(name, named, capsys, monkeypatch):
    pytest.importorskip("triton")
    tasks = []

    def compiled(every, **_):
        tasks.extend(every)
        return [Outcome(*task) for task in every]

    monkeypatch.setattr(compile_report, "compile_all", compiled)
    monkeypatch.setattr(binaries, "TRAINING_BATCH", 16)
    assert main(["compile", "--models", named(name), "--targets", "sm_90", "--dtypes", "bf16"]) == 0
    assert f"recorded from {named(name)} in bf16" in capsys.readouterr().out
    launched = {binary.name for binary, _ in tasks}
    assert "bn_finalize_kernel" in launched and any(kernel.startswith("conv_") for kernel in launched)


@pytest.mark.parametrize(
    ("command", "name", "message"),
    [
        *((command, DETECTION, f"got {DETECTION}, which takes a list of images, in training with their targets")
          for command in ("explain", "bench", "train", "compile")),
        ("explain", "torchvision.r3d_18", "which takes clips of images"),
        ("compile", "hf.bert", "its forward fails: "),
        ("bench", "hf.bert", "px: hf.bert can not take images of 224 x 224 pixels: "),
        ("train", "hf.bert", "the forward of hf.bert fails: "),
        ("train", SEGMENTATION, "expected one that gives each image 10 logits, got (10, 224, 224)"),
        ("train", "hf.rt_detr_resnet", "expected one that gives each image 10 logits, got (2048, 7, 7)"),
        *((command, "torchvision.quantized_resnet18", "computes in int8") for command in ("doctor", "train")),
        *((command, "resnet55", "model: expected a name such as resnet50")
          for command in ("explain", "bench", "train", "compile", "doctor")),
    ],
)  # fmt: skip
def test_a_command_says_in_one_line_why_it_does_not_take_a_model(command, name, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    option = {"bench": ["--model"], "train": ["--model"], "compile": ["--models"]}.get(command, [])
    assert main([command, *option, name]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith(f"fusedres {command}: error: model: ") or command == "bench"
    assert message in printed.err


@pytest.mark.parametrize("command", ["explain", "bench", "train", "compile", "doctor"])
def test_a_file_without_a_function_lists_what_it_has(command, mine, capsys):
    option = {"bench": ["--model"], "train": ["--model"], "compile": ["--models"]}.get(command, [])
    assert main([command, *option, mine.removesuffix(":Net")]) == 2
    assert "mine.py, such as Net, got ''" in capsys.readouterr().err


def test_it_is_said_whose_a_model_is(capsys):
    arguments = ["--batch", "2", "--size", "3x32x32", "--rung", "stats", "--json"]
    for name, said in (
        ("resnet18", "resnet18: fusedres's own; torchvision.resnet18 is torchvision's\n"),
        ("torchvision.resnet18", ""),
    ):
        assert main(["explain", name, *arguments]) == 0
        printed = capsys.readouterr()
        assert printed.err == said and json.loads(printed.out)["model"] == name


def test_help_imports_no_library_of_models():
    code = (
        "import sys\nfrom fusedres_cli.main import parser\nparser().format_help()\n"
        "print([name for name in ('torchvision', 'timm', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
