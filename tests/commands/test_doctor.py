"""fusedres.commands.doctor: what it says of a machine, and when it finds fault."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fusedres.bench.gate import Gate, Verdict
from fusedres.commands import doctor
from fusedres.plan.gpus import device_gpu
from fusedres.runtime import launch
from fusedres.runtime.devices import gpus
from fusedres_cli.main import main


def lines(text: str) -> dict[str, str]:
    """What follows each name."""
    return {line[:12].strip(): line[12:] for line in text.splitlines()}


def test_a_machine_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    found = lines(said)
    assert found["torch"].startswith(torch.__version__)
    assert found["GPU"] == "none that PyTorch sees; the CPU runs the library's calls"
    assert found["TF32"].startswith("used by")
    assert [line for line in said.splitlines() if line.startswith("check")] == [
        f"check       a fused block on cpu in {dtype}: as near to fp64 as eager PyTorch is"
        for dtype in ("fp32", "bf16")
    ]


def test_a_model_is_reported_on(capsys, monkeypatch):
    monkeypatch.setattr(Gate, "judge", lambda *_: Verdict())
    assert main(["doctor", "resnet18"]) == 0
    said = capsys.readouterr().out
    assert said.endswith("9 of 9 candidates fused\n20 of 20 batch norms fused\n")
    table = said.splitlines()[-15:-2]
    head = [cell.strip() for cell in table[1].strip("┃").split("┃")]
    assert head == ["name", "kind", "fused", "schedule", "norms"] and max(map(len, table)) <= 80


def test_why_batch_norms_of_a_model_are_in_no_pass_is_said(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(Gate, "judge", lambda *_: Verdict())
    file = tmp_path / "own.py"
    file.write_text(
        "from torch import nn\n"
        "class Own(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)\n"
        "    def forward(self, *xs):\n"
        "        return self.bn(self.conv(xs[0]))\n"
    )
    with pytest.warns(UserWarning, match="nothing of Own is fused"):
        assert main(["doctor", f"{file}:Own"]) == 0
    printed = capsys.readouterr().out
    told = (
        "in no pass: bn: Own can not be read: its forward takes *xs; "
        "fusedres.register(Own, ...) lets you say what it computes\n"
        "0 of 1 candidates fused\n0 of 1 batch norms fused\n"
    )
    assert " ".join(printed.split()).endswith(" ".join(told.split()))
    assert max(map(len, printed.partition("name")[2].splitlines())) <= 80


def test_a_model_is_reported_on_without_rich(capsys, monkeypatch):
    monkeypatch.setattr(Gate, "judge", lambda *_: Verdict())
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["doctor", "resnet18"]) == 0
    table = capsys.readouterr().out.splitlines()[-12:-2]
    assert table[0].split() == ["name", "kind", "fused", "schedule", "norms"] and max(map(len, table)) <= 80


def test_an_unknown_model_is_refused_first(capsys):
    assert main(["doctor", "resnet19"]) == 2
    said = capsys.readouterr()
    assert not said.out and "fusedres doctor: error: model: expected a name such as" in said.err


def fails(*_):
    raise RuntimeError("no")


@pytest.mark.parametrize(
    ("judge", "message"),
    [(lambda *_: Verdict("z differs from fp64"), "train: z differs from fp64"), (fails, "train: RuntimeError: no")],
)
def test_what_is_wrong_is_said_and_fails(judge, message, capsys, monkeypatch):
    monkeypatch.setattr(Gate, "judge", judge)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.count(f"in fp32: {message}\n") == len(gpus() or ["cpu"])


def test_each_device_is_the_current_one_while_it_is_checked(capsys, monkeypatch, current_devices):
    seen = []
    monkeypatch.setattr(Gate, "judge", lambda *_: seen.append(*current_devices) or Verdict())
    assert main(["doctor"]) == 0
    # In two formats, training and inference.
    assert seen == [name for name in gpus() or ["cpu"] for _ in range(4)] and current_devices == []


def test_packages_are_those_of_the_extras(capsys, monkeypatch):
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    named = {extra: tuple(one.split(">")[0] for one in every) for extra, every in
             pyproject["project"]["optional-dependencies"].items()}  # fmt: skip
    assert {
        extra: tuple(name for name in named[extra] if not name.startswith("fusedres")) for extra in doctor.EXTRAS
    } == doctor.EXTRAS
    monkeypatch.setattr(doctor, "_installed", lambda package: package != "timm")
    assert dict(doctor._extras())["[models]"] == "lacks timm: pip install fusedres[models]"
    assert dict(doctor._extras())["[cli]"] == "installed"


def test_versions_are_held_against_the_oldest_of_pyproject(monkeypatch):
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    asked = (one.partition(";")[0].split(">=") for one in pyproject["project"]["dependencies"])
    assert {name: tuple(map(int, oldest.split("."))) for name, oldest in asked} == doctor.OLDEST
    assert not any("too old" in found for _, found in doctor._versions())
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    monkeypatch.setattr(doctor, "triton", SimpleNamespace(__version__="3.5.1"))
    found = dict(doctor._versions())
    assert found["torch"].endswith(", too old: fusedres needs 2.10 or newer")
    assert found["triton"] == "3.5.1, too old: fusedres needs 3.6 or newer"
    monkeypatch.setattr(torch, "__version__", "2.10.0a0+git5")
    assert "too old" not in dict(doctor._versions())["torch"]


@pytest.fixture
def two_gpus(monkeypatch):
    """A T4 and an H100, as PyTorch tells of them."""
    found = [
        SimpleNamespace(
            name=name, major=major, minor=minor, shared_memory_per_block_optin=shared, multi_processor_count=count
        )
        for name, major, minor, shared, count in (
            ("Tesla T4", 7, 5, 65536, 40), ("NVIDIA H100 80GB HBM3", 9, 0, 232448, 132),
        )
    ]  # fmt: skip
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: found[index].name)
    caches = launch._device_target, launch.why_not_on, device_gpu
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_every_gpu_is_named_with_what_runs_there(two_gpus):
    found = dict(doctor._devices())
    assert found["GPU 0"] == (
        "Tesla T4, runs the plain modules: kernels use tensor cores from sm_80 on, and this is sm_75"
    )
    assert found["GPU 1"] == "NVIDIA H100 80GB HBM3, runs kernels, planned as h100"
