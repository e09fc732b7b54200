"""fusedres.bench.ops: both sides of every op compute the same, at sizes that a CPU does in no time."""

from dataclasses import replace

import pytest
import torch

from fusedres.bench.cases import block
from fusedres.bench.contenders import CONTENDERS
from fusedres.bench.declared import declared, flops_of, gpu_of
from fusedres.bench.gate import Gate
from fusedres.bench.ops import OPS, op
from fusedres.bench.setting import Setting, device_named
from tests.vgpu_support import needs_vgpu

CPU = device_named("cpu")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [name for name in OPS if name.endswith(".stage1") or "." not in name])
def test_ours_and_eagers_agree(name, dtype):
    setting = Setting("op", dtype, 2, 6, CPU)
    gate = Gate(replace(op(name), px=6), setting)
    verdict = gate.judge(CONTENDERS["fused"])
    assert verdict.reason is None
    assert verdict.error <= verdict.bound


@pytest.mark.parametrize("name", [name for name in OPS if name.endswith(".stage4") or "." not in name])
def test_kernels_are_declared_at_full_size(name):
    case = op(name)
    setting = Setting("op", "bf16", case.batch, case.px, CPU)
    counted = declared(case, setting, CONTENDERS["fused"])
    assert counted.launches >= 1
    assert counted.whole or counted.library_calls  # predicted to be faster there
    if counted.whole:
        # An op reads or writes the values of its largest tensor, or a mask of them; and not six times.
        operands = case.operands(1, case.px, torch.bfloat16, torch.Generator())
        largest = 2 * case.batch * max(operand.numel() for operand in operands if operand.dim() == 4)
        assert largest / 32 < counted.nbytes < 6 * largest


@pytest.mark.parametrize("device", ["cpu", pytest.param("vgpu:sm_80", marks=needs_vgpu)])
def test_steps_of_a_block_are_declared_whole(device):
    case = block("bottleneck2")
    setting = Setting("train", "bf16", 256, case.px, device_named(device))  # small batches drown in partial sums
    eager, moments = (declared(case, setting, CONTENDERS[name]) for name in ("eager", "fused-moments"))
    assert eager.whole and eager.library_calls == eager.launches
    assert moments.whole and moments.library_calls < moments.launches
    assert moments.nbytes < 0.45 * eager.nbytes
    assert declared(case, setting, CONTENDERS["compile"]) is None
    assert declared(case, setting, CONTENDERS["eager-nchw"]) == eager
    assert flops_of(case, setting) == pytest.approx(eager.flops, rel=0.02)
    assert gpu_of(setting.device).target == ("sm_90" if device == "cpu" else "sm_80")


def test_a_wrong_op_is_refused():
    case = replace(op("add_relu.stage1"), px=6, fused=lambda x, y: torch.relu(x - y))
    assert "differs from fp64" in Gate(case, Setting("op", "fp32", 2, 6, CPU)).judge(CONTENDERS["fused"]).reason
