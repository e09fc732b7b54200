"""fusedres.bench.harness: what a row says of contenders that are right, slow, wrong, absent or too large."""

from dataclasses import replace

import pytest
import torch

from fusedres.bench import rows as statuses
from fusedres.bench.cases import block
from fusedres.bench.contenders import CONTENDERS, contenders_named
from fusedres.bench.harness import Measurement, _is_kernel, compare, description, out_of_memory
from fusedres.bench.ops import op
from fusedres.bench.setting import Setting, device_named
from fusedres.runtime.devices import gpus
from tests.bench.tiny import (
    CPU,
    INFER,
    NETWORK,
    TRAIN,
    contender,
    hook_output,
    raising,
    sleepy,
    wrong_gradient,
)  # fmt: skip
from tests.gpu_support import allocations, needs_gpu, used_since

EAGER = CONTENDERS["eager"]
THREE = Measurement(rounds=3)


def test_a_sleeping_contender_is_ranked_last():
    contenders = (contender("sleepy", sleepy(0.2)), *contenders_named(["eager-nchw", "fused"]))
    rows = compare(NETWORK, TRAIN, contenders, THREE)
    assert [row.status for row in rows] == [statuses.OK] * 4
    assert max(rows, key=lambda row: row.median_s).contender == "sleepy"
    assert min(rows, key=lambda row: row.speedup).contender == "sleepy"
    assert next(row for row in rows if row.contender == "sleepy").median_s >= 0.2
    eager = next(row for row in rows if row.contender == "eager")
    assert eager.speedup == 1.0
    assert eager.images_per_s == pytest.approx(TRAIN.batch / eager.median_s)


def test_a_wrong_contender_has_no_figures():
    right, wrong = compare(NETWORK, TRAIN, (EAGER, contender("wrong", wrong_gradient)), THREE)
    assert (right.status, wrong.status) == (statuses.OK, statuses.REFUSED)
    assert "differs from fp64" in wrong.reason
    measured = ("median_s", "images_per_s", "speedup", "first_step_s", "peak_bytes", "tflop_per_s")
    assert all(getattr(wrong, name) is None for name in measured)
    assert all(getattr(right, name) is not None for name in ("median_s", "first_step_s", "flops"))


@pytest.mark.parametrize("name", ["fused", "fused-moments"])
def test_a_network_with_nothing_to_fuse_has_no_figures_of_fused_ones(name):
    def bare():
        return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 5))

    case = replace(NETWORK, build=bare)
    eager, fused = compare(case, INFER, contenders_named([name]), THREE)
    assert (eager.status, fused.status) == (statuses.OK, statuses.NOT_AVAILABLE)
    assert fused.reason == "NotSupported: nothing to fuse in it (no residual block that the library knows)"
    assert fused.median_s is None and fused.speedup is None and fused.error is None


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), statuses.MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), statuses.MEMORY),
        (RuntimeError("\n  something else\n"), statuses.FAILED),
    ],
)
def test_a_contender_that_raises_says_so_and_the_rest_goes_on(error, status):
    broken, whole = compare(NETWORK, INFER, (contender("broken", raising(error)), EAGER), THREE)
    assert broken.status == status
    assert broken.reason == description(error)
    assert broken.median_s is None
    assert whole.status == statuses.OK and whole.median_s > 0


def test_a_contender_that_raises_while_it_is_timed_says_so():
    left = [6]

    def change(model):
        def count(*_):
            left[0] -= 1
            if not left[0]:
                raise torch.OutOfMemoryError("out of memory")

        model[0].register_forward_hook(count)

    # A first step and three of the gate's pass, two of warm-up and what follows do not.
    late, whole = compare(NETWORK, INFER, (contender("late", change), EAGER), THREE)
    assert (late.status, late.median_s) == (statuses.MEMORY, None)
    assert whole.rounds == 3


def test_a_contender_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setattr("fusedres.bench.contenders.cudnn.why_unavailable", lambda _: "not installed: pip install x")
    rows = {row.contender: row for row in compare(NETWORK, INFER, contenders_named(["cudnn"]), THREE)}
    assert (rows["cudnn"].status, rows["cudnn"].reason) == (statuses.NOT_AVAILABLE, "not installed: pip install x")
    assert rows["eager"].status == statuses.OK


def test_everything_runs_while_the_settings_device_is_the_current_one(current_devices):
    seen = []

    def look(model):
        seen.append(("prepared", list(current_devices)))
        hook_output(model[0], lambda output: seen.append(("called", list(current_devices))) or output)

    rows = compare(NETWORK, INFER, (contender("looks", look), EAGER), THREE)
    assert [row.status for row in rows] == [statuses.OK] * 2
    # A first step, the gate's three, two rounds of warm-up and three at least that are timed.
    assert [name for name, _ in seen].count("called") >= 9
    assert all(devices == ["cpu"] for _, devices in seen) and current_devices == []


@needs_gpu
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_graphs_on_every_gpu(mode):
    """In one process, and the last one first: PyTorch's own stream for captures is on the first that is used."""
    for name in reversed(gpus()):
        setting = replace(TRAIN, mode=mode, device=device_named(name))
        before = allocations()
        rows = compare(NETWORK, setting, contenders_named(["eager-graph", "fused-graph"]), Measurement(timed=False))
        assert [(row.contender, row.status, row.reason) for row in rows] == [
            (contender, statuses.OK, None) for contender in ("eager", "eager-graph", "fused-graph")
        ]
        assert all(row.peak_bytes > 0 for row in rows)
        assert used_since(before) == [name]


def test_tf32_is_for_gpus():
    rows = compare(NETWORK, replace(INFER, dtype="tf32"), contenders_named(["fused"]), THREE)
    assert {row.reason for row in rows} == {"TF32 is a format of GPUs"}


def test_the_gate_alone_times_nothing():
    rows = compare(NETWORK, TRAIN, contenders_named(["fused"]), Measurement(timed=False))
    assert [(row.status, row.median_s) for row in rows] == [(statuses.OK, None)] * 2
    assert rows[1].error <= rows[1].bound


def test_those_that_are_done_are_left_out():
    rows = compare(NETWORK, INFER, contenders_named(["eager-nchw", "fused"]), THREE, done=["fused"])
    assert [row.contender for row in rows] == ["eager-nchw", "eager"]


# Training in fp16 takes a CPU's library a minute.
SLOW = [pytest.param(*one, marks=pytest.mark.slow) for one in (("train", "fp32"), ("infer", "bf16"), ("infer", "fp16"))]


@pytest.mark.parametrize(("mode", "dtype"), [("train", "bf16"), ("infer", "fp32"), *SLOW])
def test_a_block_on_every_rung(mode, dtype):
    case = replace(block("basic1"), px=8)
    rows = compare(case, Setting(mode, dtype, 1, 8, CPU), contenders_named(["fused", "ladder"]), Measurement(rounds=1))
    assert [(row.status, row.reason) for row in rows] == [(statuses.OK, None)] * 6
    saved = {row.contender: row.saved_bytes_per_image for row in rows}
    assert (saved["eager"] is None) == (mode == "infer")
    if mode == "train":
        assert saved["fused-prologue"] < saved["eager"]


def test_an_op_is_rated_by_its_declared_bytes():
    case = op("bn_add_relu.stage1")
    rows = compare(case, Setting("op", "fp32", 1, 8, CPU), contenders_named(["fused"]), Measurement(rounds=3))
    for row in rows:
        assert row.status == statuses.OK
        # y, residual and z, a bit for each value, a scale and a shift.
        assert row.declared_bytes == 64 * 256 * (3 * 4 + 1 / 8) + 2 * 256 * 4
        assert row.gb_per_s == pytest.approx(row.declared_bytes / row.median_s / 1e9)
        assert row.of_roofline == pytest.approx(row.roofline_s / row.median_s)


def test_what_counts_as_out_of_memory():
    assert out_of_memory(MemoryError())
    assert not out_of_memory(ValueError("x"))


def test_a_count_that_fails_leaves_the_times(monkeypatch):
    monkeypatch.setattr("fusedres.bench.harness.flops_of", lambda *_: 1 / 0)
    (row,) = compare(NETWORK, INFER, (EAGER,), THREE)
    assert row.status == statuses.OK and row.median_s > 0
    assert row.reason == "not counted: ZeroDivisionError: division by zero"


class Event:
    def __init__(self, name: str, device: str = "CUDA", annotation: bool = False) -> None:
        self.name, self.is_user_annotation = name, annotation
        self.device_type = getattr(torch.autograd.DeviceType, device)


def test_launches_are_kernels_and_nothing_else():
    events = [
        Event("conv_forward_kernel"), Event("void at::native::elementwise"), Event("Memset (Device)"),
        Event("Memcpy DtoD (Device -> Device)"), Event("aten::add", "CPU"), Event("Optimizer.step", annotation=True),
    ]  # fmt: skip
    assert [_is_kernel(event) for event in events] == [True, True, False, False, False, False]
