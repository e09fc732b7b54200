"""``fusedres tune`` without a GPU: what it says, what it predicts, and what it does with plans."""

import json

import pytest
import torch

import fusedres
from fusedres.plan.gpus import GPUS
from fusedres.runtime import plans
from fusedres.runtime.plans import Plan
from fusedres_cli.main import main

MODEL = """
from torch import nn
from torchvision.models.resnet import BasicBlock

class Two(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 16, 3), BasicBlock(16, 16), BasicBlock(16, 16))

class None_(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 16, 3), nn.ReLU())
"""


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "folder", lambda: tmp_path / "plans")
    (tmp_path / "two.py").write_text(MODEL)
    yield f"{tmp_path / 'two.py'}:Two"
    plans.forget()


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_it_says_what_it_would_measure(model, no_gpu, capsys):
    assert main(["tune", model, "--batch", "4", "--px", "32"]) == 2
    told = capsys.readouterr().err
    assert "PyTorch sees no GPU here" in told
    assert "1 kind of blocks" in told and "candidates" in told and "binaries" in told and "(predicted)" in told
    assert not plans.folder().exists()


@pytest.mark.parametrize("infer", [[], ["--infer"]])
def test_a_predicted_plan_is_written_and_fuse_goes_by_it(model, capsys, tmp_path, infer):
    out = tmp_path / "plan.json"
    arguments = ["tune", model, "--batch", "4", "--px", "32", "--predict", "--gpu", "a100", "--out", str(out), *infer]
    assert main([*arguments, "--picture", str(tmp_path / "x.png")]) == 0
    told = capsys.readouterr().out
    assert "predicted, not measured" in " ".join(told.split()) and str(out) in told
    assert (tmp_path / "x.png").stat().st_size > 10_000
    plan = plans.read(out)
    assert not plan.measured and plan.gpu == "a100"
    assert sum(len(sizes) for sizes in plan.decisions.entries["block"].values()) == len(plan.blocks)
    assert not plan.decisions.entries["tile"] and not plan.decisions.entries["way"]
    torchvision = pytest.importorskip("torchvision")
    fused = fusedres.fuse(torchvision.models.resnet18(), plan=out)
    assert {module.fused_plan.path for module in fused.modules() if hasattr(module, "fused_plan")} == {str(out)}


def test_predictions_join_in_the_cache(model, capsys):
    for batch in ("4", "8"):
        assert main(["tune", model, "--batch", batch, "--px", "32", "--predict"]) == 0
    plan = plans.read(plans.folder() / "predicted-h100.json")
    assert {entry["batch"] for entry in plan.blocks.values()} == {4, 8}
    capsys.readouterr()
    assert main(["tune", "--show"]) == 0
    told = capsys.readouterr().out
    assert "1 plan\n" in told and "predicted for h100" in told and "ms eager" in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "model: expected one to tune, or --show or --merge"),
        (["{none}"], "nothing to fuse in it"),
        (["nothing_of_this_name"], "model: expected a name such as"),
        (["{two}", "--predict", "--gpu", "abacus"], "gpu: expected a name such as"),
        (["{two}", "--out", "x.json"], "out: expected --predict with it"),
        (["{two}", "--predict", "--out", "x.txt"], "out must name a .json file"),
        (["{two}", "--picture", "x.svg"], "plot must name a .png file"),
        (["--merge", "nowhere.json"], "plan: expected a file that fusedres tune wrote"),
    ],
)
def test_what_was_asked_wrongly_is_refused(model, no_gpu, capsys, tmp_path, arguments, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [one.format(two=model, none=model.replace(":Two", ":None_")) for one in arguments]
    assert main(["tune", *given]) == 2
    assert words in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir() if file.name != "__pycache__") == ["two.py"]


def measured(path, rung, date):
    """A plan file of this machine's versions for an H100."""
    gpu = GPUS["h100"]
    plan = Plan(gpu.name, gpu.multiprocessors, "NVIDIA H100", plans.versions())
    plan.decisions.entries["block"]["one"] = {8: {"rung": rung, "ms": {rung: 1.0}, "batch": 8}}
    plan.decisions.entries["block"][f"only of {rung}"] = {8: {"rung": rung, "ms": {rung: 1.0}, "batch": 8}}
    plans.write(plan, path, date=date)
    return path


def test_plans_of_other_machines_are_merged_the_newer_of_what_both_have(model, capsys, tmp_path):
    new = measured(tmp_path / "new.json", "stats", "2026-11-30T00:00:00+00:00")
    old = measured(tmp_path / "old.json", "moments", "2026-11-01T00:00:00+00:00")
    assert main(["tune", "--merge", str(new), str(old)]) == 0
    (written,) = plans.folder().glob("*.json")
    assert str(written) in capsys.readouterr().out
    assert written == plans.path_for(GPUS["h100"])
    plan = plans.read(written)
    assert set(plan.decisions.entries["block"]) == {"one", "only of stats", "only of moments"}
    assert plan.decisions.entries["block"]["one"][8]["rung"] == "stats"
    assert plan.date == "2026-11-30T00:00:00+00:00"
    assert plans.default_for(GPUS["h100"]).words == "measured on NVIDIA H100, 2026-11-30"


def test_predicted_plans_are_not_merged_with_measured_ones(model, capsys, tmp_path):
    path = tmp_path / "predicted.json"
    plans.write(Plan.of(GPUS["h100"], measured=False), path)
    good = measured(tmp_path / "good.json", "stats", "2026-11-30T00:00:00+00:00")
    assert main(["tune", "--merge", str(good), str(path)]) == 2
    assert "expected plans that were measured" in capsys.readouterr().err
    assert not plans.folder().exists()


def test_a_file_that_is_no_plan_is_shown_as_such(model, capsys):
    plans.folder().mkdir()
    (plans.folder() / "x.json").write_text("{}")
    assert main(["tune", "--show"]) == 0
    assert "x.json: no plan" in capsys.readouterr().out


def test_a_plan_of_another_gpu_is_said_once_and_not_gone_by(tmp_path):
    path = measured(tmp_path / "h100.json", "stats", "2026-11-30T00:00:00+00:00")
    from fusedres.context import context

    with context(plan=plans.chosen_plan(path)):
        with pytest.warns(UserWarning, match="it is of NVIDIA H100 with 132 multiprocessors, and this is a100"):
            assert plans.for_call(GPUS["a100"]) is None
        assert plans.for_call(GPUS["a100"]) is None  # no second warning, which would be an error here
        assert plans.for_call(GPUS["h100"]) is not None


def test_a_plan_of_another_version_is_said_once_and_not_gone_by(tmp_path):
    from fusedres.context import context

    path = measured(tmp_path / "h100.json", "stats", "2026-11-30T00:00:00+00:00")
    told = json.loads(path.read_text())
    told["made_with"]["triton"] = "2.0"
    path.write_text(json.dumps(told))
    with context(plan=plans.chosen_plan(path)), pytest.warns(UserWarning, match="it was made with triton 2.0, here"):
        assert plans.for_call(GPUS["h100"]) is None


def test_explain_says_whether_a_choice_was_measured(model, capsys):
    """A plan of this machine for a GPU, as if it had been measured there."""
    arguments = [model, "--batch", "4", "--gpu", "h100"]
    assert main(["explain", *arguments, "--size", "3x32x32", "--rung", "auto", "--json"]) == 0
    before = [layer for layer in json.loads(capsys.readouterr().out)["layers"] if "choice" in layer]
    assert before and {layer["source"] for layer in before} == {"predicted"}

    assert main(["tune", *arguments, "--px", "32", "--predict"]) == 0
    capsys.readouterr()
    gpu = GPUS["h100"]
    plan = Plan(gpu.name, gpu.multiprocessors, "NVIDIA H100", plans.versions())
    plan.decisions.add(plans.read(plans.folder() / "predicted-h100.json").decisions)
    for choices in plan.decisions.entries["block"].values():
        choices[4]["rung"] = "moments"
    plans.write(plan, plans.path_for(gpu))
    plans.forget()
    assert main(["explain", *arguments, "--size", "3x32x32", "--rung", "auto", "--json"]) == 0
    after = [layer for layer in json.loads(capsys.readouterr().out)["layers"] if "choice" in layer]
    assert {layer["choice"] for layer in after} == {"moments"}
    assert all(layer["source"].startswith("measured on NVIDIA H100, 20") for layer in after)
