"""The way of the kernel tests through a device: strides kept, what is unwritten seen, updates brought back."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from fusedres.bench.declared import nearest
from fusedres.bench.setting import device_named
from fusedres.operands import ConvInput, Norm, NormNumbers, Partials
from fusedres.ops.bn_finalize import bn_finalize
from tests.kernels import on_device
from tests.kernels.on_device import mapped, moved, poisoned
from tests.vgpu_support import needs_vgpu

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(2, 3, 1, 1).expand(2, 3, 4, 4),
        torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)[:, 2:6, ::2],
        torch.randn(3).to(torch.bfloat16),
        torch.empty(0, 3),
    ],
    ids=["broadcast", "a slice", "16 bits", "empty"],
)
def test_strides_and_values_are_kept(tensor: torch.Tensor) -> None:
    there = moved(tensor, CPU)
    assert torch.equal(there, tensor)
    assert there.stride() == tensor.stride()
    assert there.storage_offset() == tensor.storage_offset()
    assert tensor.numel() == 0 or there.data_ptr() != tensor.data_ptr()


def test_nested_operands_keep_their_kind() -> None:
    operand = ConvInput(torch.ones(1))
    assert mapped((operand, 3, None), lambda tensor: tensor + 1) == (ConvInput(torch.tensor([2.0])), 3, None)


def test_memory_that_nothing_wrote_is_nan() -> None:
    with poisoned():
        assert torch.empty(64).isnan().all()
        assert torch.empty((4, 4), dtype=torch.bfloat16).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@needs_vgpu
def test_running_statistics_are_brought_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "DEVICE", device_named("vgpu:sm_90"))
    running = [torch.zeros(8), torch.ones(8)]
    partials = Partials(torch.tensor([4.0]), torch.full((1, 8), 3.0), torch.full((1, 8), 8.0))
    with on_device.on_device(running) as trace:
        bn_finalize(partials, Norm(None, None, *running, numbers=NormNumbers(momentum=1.0)))
    assert trace.by_kernel() == {"bn_finalize_kernel": 1}
    assert torch.equal(running[0], torch.full((8,), 3.0))
    with on_device.on_device([]):
        other = [torch.zeros(8), torch.ones(8)]
        bn_finalize(partials, Norm(None, None, *other, numbers=NormNumbers(momentum=1.0)))
    assert torch.equal(other[0], torch.zeros(8))


def test_what_the_library_would_do_is_left_to_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "DEVICE", device_named("cpu"))
    from fusedres.runtime import backends

    with patch("fusedres.runtime.launch.record"), on_device.on_device([]):
        assert not backends.runs_native()
        assert backends.current() == "triton"


@pytest.mark.parametrize(
    ("capability", "target"),
    [(80, "sm_80"), (87, "sm_86"), (89, "sm_89"), (90, "sm_90"), (103, "sm_100"), (121, "sm_120"), (75, "sm_80")],
)
def test_the_nearest_listed_target(capability: int, target: str) -> None:
    assert nearest(capability) == target


def run_on(device: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments], cwd=ROOT, capture_output=True,
        text=True, timeout=300, check=False, env={**os.environ, "FUSEDRES_TEST_DEVICE": device},
    )  # fmt: skip


@needs_vgpu
def test_the_same_tests_run_through_a_device() -> None:
    done = run_on("vgpu:sm_90", "tests/kernels/test_act_mask.py", "-k", "not_finite or (every_tile and odd)")
    assert "4 passed" in done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_an_error() -> None:
    done = run_on("cuda", "tests/kernels/test_act_mask.py")
    assert done.returncode != 0
    assert "device: expected one of the 0 GPUs that PyTorch sees here" in done.stdout
