"""fusedres.bench.ops: both sides of every op compute the same, at sizes that a CPU does in no time."""

from dataclasses import replace

import pytest
import torch

from fusedres.bench.cases import op, ops
from fusedres.bench.contenders import CONTENDERS
from fusedres.bench.declared import declared
from fusedres.bench.gate import Gate
from fusedres.bench.setting import Setting, device_named

CPU = device_named("cpu")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [name for name in ops() if name.endswith(".stage1") or "." not in name])
def test_ours_and_eagers_agree(name, dtype):
    setting = Setting("op", dtype, 2, 6, CPU)
    gate = Gate(replace(op(name), px=6), setting)
    verdict = gate.judge(CONTENDERS["fused"])
    assert verdict.reason is None
    assert verdict.error <= verdict.bound


@pytest.mark.parametrize("name", [name for name in ops() if name.endswith(".stage4") or "." not in name])
def test_kernels_are_declared_at_full_size(name):
    case = op(name)
    setting = Setting("op", "bf16", case.batch, case.px, CPU)
    counted = declared(case, setting, CONTENDERS["fused"])
    assert counted.launches >= 1
    assert counted.whole or name.startswith("conv3x3_input_grad")
    if counted.whole:
        # An op reads or writes the values of its largest tensor, or a mask of them; and not six times.
        operands = case.operands(1, case.px, torch.bfloat16, torch.Generator())
        largest = 2 * case.batch * max(operand.numel() for operand in operands if operand.dim() == 4)
        assert largest / 32 < counted.nbytes < 6 * largest


def test_a_wrong_op_is_refused():
    case = replace(op("add_relu.stage1"), px=6, fused=lambda x, y: torch.relu(x - y))
    assert "differs from fp64" in Gate(case, Setting("op", "fp32", 2, 6, CPU)).judge(CONTENDERS["fused"]).reason
