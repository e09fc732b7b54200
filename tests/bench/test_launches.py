"""fusedres.bench.launches: every launch of a step once more, alone, and what is written of its time."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import fusedres
from fusedres.bench import launches
from fusedres.bench.launches import (
    TIME_OVER,
    cells,
    distinct,
    events_seconds,
    measure,
    png,
    read_launches,
    run,
    steps_on_paper,
    sums,
    table,
)
from fusedres.bench.setting import device_named
from fusedres.explain import Question, explain
from fusedres.plan import calibrate
from fusedres.plan.gpus import GPUS, assume_gpu
from fusedres.plan.time import seconds_of
from fusedres.runtime.launch import record
from fusedres.runtime.torch_private import DispatchMode
from fusedres.traffic.predict import on_paper
from tests.bench.tiny import CPU
from tests.timed_launches import H100, MACHINE, rows, timed
from tests.vgpu_support import needs_vgpu


def test_a_step_on_paper_is_what_explain_predicts():
    told = explain(Question("resnet50", 256, "bf16", "h100", ("auto",)))
    for step, expected in (("fused", told.rungs["auto"]), ("eager", told.eager)):
        own = [row for row in rows() if row.step == step]
        predicted = 1e3 * sum(row.count * row.predicted_s for row in own)
        assert predicted == pytest.approx(told.figures(expected).predicted_ms, rel=0.02)
        assert sum(row.moved * row.count for row in own) > 0.9 * sum(entry.bytes for entry in expected.entries)


def test_each_launch_is_there_once_and_its_prediction_is_that_of_what_is_written():
    assert len({(row.step, row.key) for row in rows()}) == len(rows())
    for row in rows():
        assert seconds_of(calibrate.read(row.work), H100) == pytest.approx(row.predicted_s)
    names = {row.name for row in rows() if row.step == "fused"}
    assert {"conv_forward_kernel", "bn_act_kernel", "convolution_weight_grad"} <= names
    assert {row.bound_by for row in rows()} >= {"memory", "latency", "tensor cores", "gap between launches"}


def small_steps(infer=False):
    with fusedres.backend("vgpu:sm_90"):
        return steps_on_paper("cifar_resnet20", 2, "bf16", GPUS["h100"], px=8, infer=infer)


class Counted:
    """Seconds that are told by what was called before."""

    def __init__(self):
        self.calls = 0

    def seconds(self, step, times=1):
        step()
        self.calls += 1
        return 1e-3


@needs_vgpu
def test_launches_run_with_operands_of_their_own(monkeypatch):
    """The same kernels on the same grids, and the library's calls, as the step itself makes them."""
    monkeypatch.setattr(launches, "FEWEST", 1)
    monkeypatch.setattr(launches, "MOST", 1)
    steps, device, clock = small_steps(infer=True), device_named("vgpu:sm_90"), Counted()
    with record() as trace:
        found = run(steps, GPUS["h100"], device, clock=clock)
    assert not any(row.reason for row in found) and {row.measured_s for row in found} == {1e-3}
    ours = {row.key: row for row in found if row.name.endswith("_kernel")}
    assert ours and set(trace.by_kernel()) == {row.name for row in ours.values()}
    assert {row.step for row in found} == {"fused", "eager"}
    assert clock.calls == 2 * len({row.key for row in found})
    assert sum(row.count for row in found if row.step == "fused") <= len(steps["fused"])
    again = run(steps, GPUS["h100"], device, rows=found, clock=clock)
    assert again == found and clock.calls == 2 * len({row.key for row in found})


def a_step():
    x, weight = torch.empty(2, 4, 6, 6, device="meta"), torch.empty(4, 4, 3, 3, device="meta")
    weight.requires_grad_()

    def step():
        nn.functional.conv2d(x, weight, padding=1).relu_().backward(torch.empty(2, 4, 6, 6, device="meta"))

    return step


def test_a_call_that_fails_has_a_reason_and_the_others_are_measured():
    steps = {"eager": on_paper(a_step(), H100, keep=True)}

    class Refuses(Counted):
        def seconds(self, step, times=1):
            if self.calls == 3:  # the first round of the second launch
                self.calls += 1
                raise RuntimeError("no\nmore")
            return super().seconds(step, times)

    told = []
    clock = Refuses()
    found = run(steps, H100, CPU, clock=clock, add=told.append)
    assert told == found and {row.name for row in found} >= {"convolution", "relu_", "convolution_weight_grad"}
    assert [row.reason for row in found if row.reason] == ["RuntimeError: no"]
    assert {row.measured_s for row in found} == {None, 1e-3}
    failed = next(row for row in found if row.reason)
    assert sums(found)[0].endswith("; 1 launches were not measured")
    assert f"- not measured: eager, 1 x {failed.name} ({failed.operands}): RuntimeError: no" in table(found)


def test_what_events_add_is_taken_off():
    """On a clock that adds 5 us to whatever is between two events, where each launch takes 2 us."""

    class Events:
        def seconds(self, step, times=1):
            with Launches() as counted:
                step()
            return 5e-6 + 2e-6 * counted.number

    class Launches(DispatchMode):
        number = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.number += 1
            return func(*args, **(kwargs or {}))

    assert events_seconds(Events(), torch.device("cpu")) == pytest.approx(5e-6)
    [row, *_] = run({"eager": on_paper(a_step(), H100, keep=True)}, H100, CPU, clock=Events())
    work = next(one for one in distinct("eager", on_paper(a_step(), H100, keep=True), H100, {}) if one.made)
    timed_alone = measure(work, torch.device("cpu"), Events(), 5e-6)
    assert timed_alone.measured_s == pytest.approx(2e-6) and timed_alone.events_s == 5e-6
    assert row.measured_s == pytest.approx(7e-6) and row.events_s == 0
    assert measure(work, torch.device("cpu"), Events(), 1.0).measured_s == pytest.approx(7e-7)


def test_when_time_is_over_the_rest_is_left_for_the_next_run():
    steps = {"eager": on_paper(a_step(), H100, keep=True)}
    over = run(steps, H100, CPU, clock=Counted(), seconds=-1)
    assert {row.reason for row in over} == {TIME_OVER}
    told = f"- not measured, since time was over: {len(over)} launches of those that take least; run it again"
    assert table(over)[-1] == told


def test_what_the_prediction_misses_by_most_comes_first():
    found = timed()
    shown = cells(found)
    missed = [row.missed for row in sorted(found, key=lambda row: -row.missed)]
    assert len(shown) == len(found) and missed[0] > 10 * missed[-1] > 0
    first = max(found, key=lambda row: row.missed)
    assert shown[0][1] == first.name and shown[0][7] == f"{first.measured_s / first.predicted_s:.2f}"
    lines = table(found, 5)
    assert sum(line.startswith("| ") for line in lines) == 1 + 5 and f"The first 5 of {len(found)}." in lines
    predicted, measured = (
        1e3 * sum(row.count * getattr(row, name) for row in found if row.step == "fused")
        for name in ("predicted_s", "measured_s")
    )
    assert f"predicted {predicted:.2f} ms, measured one by one {measured:.2f} ms" in sums(found)[0]


def test_a_picture():
    assert png(timed())[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(png([])) > 1000


def test_arguments_that_make_no_sense_are_refused(capsys):
    for arguments, message in (
        (["--device", "cpu"], "device: expected a GPU, or vgpu:<target>, got 'cpu'"),
        (["--device", "nowhere"], "device: expected"),
        (["--csv", "a.txt"], "csv must name a .csv file"),
    ):
        assert launches.main(arguments) == 2
        assert message in capsys.readouterr().err


@needs_vgpu
def test_rows_of_another_device_are_not_gone_on_with(capsys, tmp_path):
    path = tmp_path / "launches.csv"
    writer = launches.Writer(path, [replace(one, measured_s=1.0) for one in rows()[:2]])
    writer.close()
    assert launches.main(["--device", "vgpu:sm_90", "--csv", str(path), "--resume"]) == 2
    assert f"got some of {MACHINE['device']}" in capsys.readouterr().err
    assert len(read_launches(path)) == 2


def test_with_other_constants_predictions_of_a_step_differ():
    """A GPU's own constants reach every prediction that is made for it."""
    slow = replace(H100, measured={"library.products": 0.2, "library.bandwidth": 0.3, "rows": 0.4, "library.rows": 0.4})
    with assume_gpu(slow):
        steps = steps_on_paper("resnet18", 64, "bf16", slow)
    usual = steps_on_paper("resnet18", 64, "bf16", H100)
    totals = [
        sum(work.row.count * work.row.predicted_s for work in distinct("eager", every["eager"], gpu, {}))
        for every, gpu in ((steps, slow), (usual, H100))
    ]
    assert totals[0] > 1.5 * totals[1] and math.isfinite(totals[0])
