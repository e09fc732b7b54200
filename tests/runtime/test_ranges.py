"""Names of passes in a profiler's timeline."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

import fusedres
from fusedres.nn import BasicBlock
from fusedres.runtime import ranges


def network():
    return fusedres.fuse(nn.Sequential(BasicBlock(8, 8), nn.Sequential(BasicBlock(8, 16, stride=2))), schedule="stats")


def step(model):
    model(torch.randn(2, 8, 6, 6)).sum().backward()


def traced(tmp_path, run):
    """The events of a Chrome trace, as a browser would read it."""
    with profiler(activities=[ProfilerActivity.CPU]) as found:
        run()
    path = tmp_path / "trace.json"
    found.export_chrome_trace(str(path))
    return [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]


def test_passes_have_the_names_of_their_blocks_and_schedules_in_a_chrome_trace(tmp_path):
    model = network()

    def run():
        with fusedres.profile():
            step(model)

    events = traced(tmp_path, run)
    named = {event["name"]: event for event in events}
    for name in ("0 stats", "1.0 stats", "0 stats backward", "1.0 stats backward"):
        assert name in named, sorted(named)
    # What a pass calls lies inside its range.
    for name in ("0 stats", "0 stats backward"):
        begin, end = named[name]["ts"], named[name]["ts"] + named[name]["dur"]
        inside = [one["name"] for one in events if begin <= one["ts"] and one["ts"] + one["dur"] <= end]
        assert any("convolution" in one for one in inside)


def test_without_asking_there_are_none(tmp_path):
    model = network()
    events = traced(tmp_path, lambda: step(model))
    assert not [event["name"] for event in events if event["name"].endswith((" stats", " stats backward"))]
    assert ranges.named("stats") is ranges.NOTHING


def test_a_block_that_eager_pytorch_runs_is_named_so(tmp_path, monkeypatch):
    from fusedres.patterns import door
    from fusedres.patterns.choose import EAGER, Choice
    from fusedres.plan.gpus import GPUS, assume_gpu
    from fusedres.runtime.launch import record

    monkeypatch.setattr(door, "choose", lambda *_, **__: Choice(EAGER, "", {}, {}))
    model = fusedres.fuse(BasicBlock(8, 8)).to("meta")
    gpu = GPUS["h100"]
    with record(gpu.target), assume_gpu(gpu):
        events = traced(tmp_path, lambda: profiled(model))
    assert "BasicBlock eager" in {event["name"].replace("Fused", "") for event in events}


def profiled(model):
    with fusedres.profile():
        model(torch.empty(2, 8, 6, 6, device="meta"))


def test_an_environment_variable_asks_too():
    code = "from fusedres.runtime import ranges; print(ranges.wanted())"
    for value, expected in (("1", "True"), ("0", "False")):
        done = subprocess.run(
            [sys.executable, "-c", code], env={"FUSEDRES_PROFILE": value}, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected


@pytest.mark.parametrize("wanted", [False, True])
def test_numbers_do_not_depend_on_it(wanted):
    torch.manual_seed(0)
    model = network()
    x = torch.randn(2, 8, 6, 6)
    torch.manual_seed(1)
    if wanted:
        with fusedres.profile():
            z = model(x)
            z.sum().backward()
    else:
        z = model(x)
        z.sum().backward()
    plain = fusedres.unfuse(model)
    plain.zero_grad()
    assert torch.allclose(plain.train()(x), z, atol=1e-5)
