"""fusedres.bench.families: every kernel of ours is launched and judged."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fusedres
from fusedres.bench import families
from fusedres.bench.families import KERNELS, checked
from fusedres.bench.setting import device_named
from fusedres.ops.bn_prelu import bn_prelu
from fusedres_cli.main import main
from tests.vgpu_support import needs_vgpu

SOURCES = (Path(fusedres.__file__).parent / "kernels").glob("*.py")


def test_every_kernel_is_named():
    """Whoever writes a kernel gives it a case: one that no case launches is reported."""
    found = {name for path in SOURCES for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)}
    assert found == set(KERNELS)


def few(monkeypatch, *names):
    every = list(families._cases("sm_90"))
    monkeypatch.setattr(families, "_cases", lambda _: [one for one in every if one[0].name in names])


@needs_vgpu
def test_cases_launch_kernels_and_are_judged(monkeypatch):
    few(monkeypatch, *(one.name for one in families._OWN), "conv_pointwise")
    found = {one.case: one for one in checked(device_named("vgpu:sm_90"))}
    own = {name: one for name, one in found.items() if one.kernels}
    assert {name: one.reason for name, one in own.items()} == dict.fromkeys(own)
    launched = set().union(*(one.kernels for one in own.values()))
    assert launched >= {
        "act_backward_kernel", "bn_prelu_kernel", "bn_prelu_reduce_kernel", "bn_prelu_apply_kernel",
        "bn_running_kernel", "bn_combine_kernel", "space_to_depth_kernel", "conv_pointwise_kernel",
    }  # fmt: skip
    left = {one.case for one in found.values() if one.reason == "no case launched it"}
    assert left == set(KERNELS) - launched


@needs_vgpu
@pytest.mark.slow
def test_all_of_them():
    every = list(checked(device_named("vgpu:sm_90")))
    assert [one for one in every if one.reason] == []
    assert set().union(*(one.kernels for one in every)) == set(KERNELS)


@needs_vgpu
def test_a_kernel_that_computes_something_else_is_found(monkeypatch, capsys):
    few(monkeypatch, "bn_prelu", "bn_from_running")
    cases = [
        (replace(case, fused=lambda *x: 1.01 * bn_prelu(*x)) if case.name == "bn_prelu" else case, *rest)
        for case, *rest in families._cases("sm_90")
    ]
    monkeypatch.setattr(families, "_cases", lambda _: cases)
    monkeypatch.setattr(families, "KERNELS", ("bn_prelu_kernel", "bn_running_kernel"))
    monkeypatch.setattr("fusedres.commands.doctor._wrong", lambda *_: None)
    assert main(["doctor", "--kernels", "--device", "vgpu:sm_90"]) == 1
    said = capsys.readouterr().out
    assert "kernels     bn_prelu on vgpu:sm_90 in bf16: output differs from fp64 by 1.0e-02" in said
    assert "kernels     1 of 2 kernels on vgpu:sm_90 in bf16: as near to fp64 as eager PyTorch is" in said


def test_where_no_kernels_run_they_can_not_be_checked(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor", "--kernels"]) == 2
    assert "kernels: expected a GPU or --device vgpu:<target>, which run them, got cpu" in capsys.readouterr().err
    assert main(["doctor", "--device", "nowhere"]) == 2
