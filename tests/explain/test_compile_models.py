"""fusedres compile MODEL: after it another process compiles nothing, and what was asked wrongly is refused before."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusedres.explain import compile_models
from fusedres.explain.compile_models import gpu_of
from fusedres.explain.launched import Paper
from fusedres.models.sources import source
from fusedres.plan.decisions import TILE, WAY, taken
from fusedres.plan.gpus import GPUS
from fusedres_cli.main import main
from tests.small_kernels import triton

ROOT = Path(__file__).parents[2]
# One bottleneck behind a stem: kernels of every kind, few binaries.
MODEL = """
from torch import nn
from torchvision.models.resnet import Bottleneck

class Small(nn.Sequential):
    def __init__(self):
        down = nn.Sequential(nn.Conv2d(16, 64, 1, bias=False), nn.BatchNorm2d(64))
        super().__init__(Bottleneck(16, 16, downsample=down), Bottleneck(64, 16), nn.AdaptiveAvgPool2d(1))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.body = nn.Conv2d(3, 16, 1), Small()
    def forward(self, x):
        return self.body(self.first(x))
"""
# In another process, by the public interface, and by the compiler that a launch calls.
SECOND = """
import json, sys
import torch, triton
import fusedres
from fusedres.compiler.folders import use_for
from fusedres.compiler.known import compile_binary
from fusedres.traffic.meta_autocast import meta_autocast
from fusedres.models.sources import source

path, dtype = sys.argv[1:]
use_for("sm_90")
compiled, found = [], []
triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: (found if cache_hit else compiled).append(src.name)
model = fusedres.fuse(source(path).on_meta())
x = torch.empty(4, 3, 24, 24, device="meta").contiguous(memory_format=torch.channels_last)
with fusedres.record("sm_90") as trace:
    with meta_autocast(getattr(torch, dtype)):
        y = model(x)
    y.backward(torch.empty_like(y))
    with torch.no_grad(), meta_autocast(getattr(torch, dtype)):
        model.eval()(x)
for launch in trace.launches:
    compile_binary(launch.binary, "sm_90")
print(json.dumps([len(trace.launches), len({launch.binary for launch in trace.launches}), len(compiled), len(found)]))
"""


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(MODEL)
    return f"{path}:Model"


def second(tmp_path, model, dtype, **told):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "second"), **told}
    done = subprocess.run(
        [sys.executable, "-c", SECOND, model, dtype], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_after_it_another_process_compiles_nothing(tmp_path, model, capsys):
    folder = tmp_path / "fusedres" / "binaries"
    asked = ["compile", model, "--target", "sm_90", "--batch", "4", "--px", "24"]
    assert main([*asked, "--out", str(folder)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    count = int(said.split(" binaries of ")[0])
    assert f"for sm_90 (h100, bf16): {count} compiled, 0 were there, 0 failed" in said
    told = json.loads((folder / "manifest.json").read_text())
    assert told["targets"] == {"sm_90": count} and told["models"] == [model]

    launches, binaries, compiled, found = second(tmp_path, model, "bfloat16", FUSEDRES_CACHE=str(tmp_path / "fusedres"))
    assert (binaries, compiled, found) == (count, 0, launches)
    # Where nothing was compiled ahead, the same count is of compilations.
    _, _, compiled, _ = second(tmp_path, model, "float16", FUSEDRES_CACHE=str(tmp_path / "fusedres"))
    assert compiled > 10

    assert main([*asked, "--out", str(folder), "--infer"]) == 0
    assert "0 compiled, " in capsys.readouterr().out
    assert json.loads((folder / "manifest.json").read_text())["targets"] == {"sm_90": count}


@pytest.mark.slow
def test_with_tune_every_option_of_what_was_asked_is_there(model):
    paper = Paper(source(model), GPUS["h100"], 4, 24, "bf16")
    default, every = paper.binaries(infer=True), paper.binaries(infer=True, tune=True)
    assert {*default} < {*every}
    # Both GEMM tiles and warps vary among what is tried for one kernel.
    tried = {}
    for binary in every:
        tried.setdefault(binary.name, set()).add((binary.num_warps, binary.num_stages, binary.specialisation.constants))
    assert max(map(len, tried.values())) > 5


def test_every_option_of_every_site_is_tried(monkeypatch):
    from fusedres.explain import launched

    asked = []

    def run():
        # Tile b is asked for on one way alone, and only where tile a is not the first.
        a = taken(TILE, lambda: "a", 1, ["a0", "a1", "a2"])
        way = taken(WAY, lambda: "way", 1, ["plain", "joined", "split"])
        b = taken(TILE, lambda: "b", 1, ["b0", "b1", "b2"], more=lambda: ["b3"]) if way == "split" else None
        c = taken(WAY, lambda: "inner", 1, ["x", "y"]) if way == "split" else None
        asked.append((a, way, b, c))

    monkeypatch.setattr(launched, "on_paper", lambda run, gpu: run() or [])
    assert list(launched._with_every_option(run, GPUS["h100"])) == []
    assert {one[0] for one in asked} == {"a0", "a1", "a2"}
    assert {one[1] for one in asked} == {"plain", "joined", "split"}
    assert {one[2] for one in asked} == {None, "b0", "b1", "b2"}  # b3 is no option that a name can stand for
    assert {one[3] for one in asked} == {None, "x", "y"}
    assert len(asked) < 20


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["nonsense", "--target", "sm_90"], "model: expected a name such as"),
        (["cifar_resnet20", "nonsense", "--target", "sm_90"], "model: expected a name such as"),
        (["cifar_resnet20", "--target", "sm_91"], "target: expected one of sm_80, sm_86"),
        (["cifar_resnet20", "--target", "h1000"], "or a GPU such as h100, h100_pcie, h200, gh200, got 'h1000'"),
        (["cifar_resnet20", "--target", "sm_90", "--dtype", "fp8"], None),
        (["cifar_resnet20", "--target", "sm_90", "--px", "0"], None),
        (["torchvision.alexnet", "--target", "sm_90"], "model: torchvision.alexnet: nothing to fuse in it"),
        (["cifar_resnet20", "--target", "sm_90", "--report"], "--report: expected without MODEL"),
        (["cifar_resnet20", "--targets", "sm_90"], "--targets: expected without MODEL"),
        (["--report", "--target", "sm_90"], "--target: expected with MODEL"),
        (["--tune"], "--tune: expected with MODEL"),
    ],
)
def test_what_was_asked_wrongly_is_refused_before_anything_is_compiled(arguments, error, monkeypatch, capsys):
    monkeypatch.setattr(compile_models, "compile_ahead", lambda *_, **__: pytest.fail("compiled"))
    if error is None:
        with pytest.raises(SystemExit, match="2"):
            main(["compile", *arguments])
        return
    assert main(["compile", *arguments]) == 2
    assert error in capsys.readouterr().err


def test_inference_of_one_image_needs_no_training_step_of_one(model):
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        Paper(source(model), GPUS["h100"], 1, 1, "bf16")
    paper = Paper(source(model), GPUS["h100"], 1, 1, "bf16", infer=True)
    assert {*paper.binaries(infer=True)}


def test_a_folder_of_something_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compile_models, "compile_ahead", lambda *_, **__: pytest.fail("compiled"))
    (tmp_path / "thesis.tex").write_text("")
    assert main(["compile", "cifar_resnet20", "--target", "sm_90", "--out", str(tmp_path)]) == 2
    assert "out: expected a new or empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_was_broken_off_is_taken_up(tmp_path, monkeypatch, capsys):
    asked = [
        "compile",
        "cifar_resnet20",
        "--target",
        "sm_80",
        "--batch",
        "4",
        "--infer",
        "--out",
        str(tmp_path / "out"),
    ]

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compile_models, "compile_ahead", interrupted)
        assert main(asked) == 130
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["targets"] == {"sm_80": 0}
    monkeypatch.setattr(compile_models, "compile_ahead", lambda *_, **__: {})
    assert main(asked) == 0


def test_a_binary_that_does_not_compile_is_named(tmp_path, monkeypatch, capsys):
    from fusedres.compiler.ahead import Made

    monkeypatch.setattr(
        compile_models,
        "compile_ahead",
        lambda every, *_, **__: {one: Made("the compiler crashed (status 1)" if i == 0 else None, 1.0)
                                 for i, one in enumerate(every)},
    )  # fmt: skip
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with triton.knobs.cache.scope():
        assert main(["compile", "cifar_resnet20", "--target", "sm_80", "--batch", "4", "--infer"]) == 1
    said = capsys.readouterr().out
    assert ", 1 failed;" in said
    assert said.count("FAILED: ") == 1 and said.rstrip().endswith(": the compiler crashed (status 1)")


def test_what_a_target_stands_for(monkeypatch):
    assert gpu_of("sm_90") is GPUS["h100"] and gpu_of("gfx942") is GPUS["mi300x"]
    assert gpu_of("H100-PCIe") is GPUS["h100_pcie"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for target in (None, "here"):
        with pytest.raises(ValueError, match="on a machine without a GPU"):
            gpu_of(target)
