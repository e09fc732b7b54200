"""Candidates on a device: held against fp64 before they are timed, and what is wrong is left out."""

import copy

import pytest
import torch
from torch import nn

import fusedres
from fusedres.compiler.ahead import Made
from fusedres.context import context
from fusedres.nn import BasicBlock
from fusedres.patterns.choose import run_on
from fusedres.plan.decisions import Decisions
from fusedres.plan.gpus import GPUS, assume_gpu
from fusedres.runtime import plans
from fusedres.runtime.launch import LaunchFailed, record
from fusedres.tuning import device as device_module
from fusedres.tuning.blocks import blocks_of
from fusedres.tuning.device import Device
from fusedres.tuning.tuner import Candidate

GPU = GPUS["h100"]
CPU = torch.device("cpu")


def network():
    return nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 32, stride=2)).to(memory_format=torch.channels_last)


def gathered(dtype=torch.float32, *, infer=False):
    """The calls of a small network, as on the meta device."""
    model = fusedres.fuse(network()).to("meta", dtype).train(not infer)
    images = torch.empty(6, 16, 8, 8, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
    with record(GPU.target), assume_gpu(GPU), context(replays=False), torch.set_grad_enabled(not infer):
        return blocks_of(model, lambda: model(images))


def bench(on=CPU):
    return Device(on, GPU, {})


@pytest.mark.parametrize("infer", [False, True])
def test_rungs_that_compute_the_same_are_trusted(infer):
    for block in gathered(infer=infer):
        for rung in bench().rungs(block):
            assert bench().why_wrong(block, Candidate(rung, Decisions())) is None, rung


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        (lambda z: z * 1.001, "output differs from fp64"),
        (lambda z: z + (z - z.detach()), "gradient"),  # twice the gradient
    ],
    ids=["output", "gradient"],
)
def test_a_candidate_that_is_wrong_is_told_from_those_that_are_right(monkeypatch, wrong, where):
    def run(pattern, rung, *, training):
        z = run_on(pattern, rung, training=training)
        return wrong(z) if rung.name == "stats" else z

    monkeypatch.setattr(device_module, "run_on", run)
    block = gathered()[0]
    why = bench().why_wrong(block, Candidate("stats", Decisions()))
    assert why is not None and where in why
    assert bench().why_wrong(block, Candidate("prologue", Decisions())) is None


def test_running_statistics_are_held_against_eager_too(monkeypatch):
    def run(pattern, rung, *, training):
        z = run_on(pattern, rung, training=training)
        if rung.name == "stats":
            with torch.no_grad():
                next(iter(pattern.norms)).running_var.mul_(1.01)
        return z

    monkeypatch.setattr(device_module, "run_on", run)
    why = bench().why_wrong(gathered()[0], Candidate("stats", Decisions()))
    assert why is not None and "running variance 0" in why


def test_checks_do_not_depend_on_what_ran_before():
    block, one = gathered()[0], bench()
    assert one.why_wrong(block, Candidate("stats", Decisions())) is None
    one._call(block, Candidate("stats", Decisions()))(one._rotated(block)[0])  # moves running statistics
    assert one.why_wrong(block, Candidate("prologue", Decisions())) is None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LaunchFailed("kernel", "cuda:0", RuntimeError("no such image")), "LaunchFailed: kernel could not be started"),
        (torch.OutOfMemoryError("tried to allocate"), "out of memory"),
        (RuntimeError("something\nelse"), "RuntimeError: something else"),
    ],
)
def test_what_raises_has_a_reason_in_one_line(monkeypatch, error, words):
    def run(pattern, rung, *, training):
        if rung.name == "stats":
            raise error
        return run_on(pattern, rung, training=training)

    monkeypatch.setattr(device_module, "run_on", run)
    why = bench().why_wrong(gathered()[0], Candidate("stats", Decisions()))
    assert why.startswith(words)


def test_what_does_not_compile_is_left_out(monkeypatch):
    asked = []

    def compiled(binaries, target, **how):
        binaries = list(binaries)
        asked.append((len(binaries), target, how["limit_s"]))
        return {one: Made("took more than 60 s" if one is binaries[0] else None, 1.0) for one in binaries}

    monkeypatch.setattr(device_module, "compile_ahead", compiled)
    block, one = gathered(torch.bfloat16)[0], bench()
    left = one.ready(block, {"stats": Candidate("stats", Decisions())})
    assert left["stats"].endswith("took more than 60 s")
    assert asked[0][1] == GPU.target
    again = one.ready(block, {"stats": Candidate("stats", Decisions())})
    assert again == left and len(asked) == 1  # neither compiled nor waited for again


def test_operands_are_rotated_over_more_than_twice_the_cache(monkeypatch):
    block, one = gathered()[0], bench()
    x = block.gathered.pattern.x
    monkeypatch.setattr(device_module, "cache_bytes", lambda _: 3 * x.numel() * x.element_size())
    cases = one._rotated(block)
    assert len(cases) == 6
    assert len({case.pattern.x.data_ptr() for case in cases}) == 6


def test_where_there_is_no_memory_for_so_many_there_are_fewer(monkeypatch):
    block, one = gathered()[0], bench()
    made = []

    def case(block, seed, batch, dtype=None):
        if len(made) == 5:  # a device that holds as many
            made.clear()
            raise torch.OutOfMemoryError("tried to allocate")
        made.append(seed)
        return seed

    monkeypatch.setattr(one, "_case", case)
    assert len(one._rotated(block)) == 4  # of 32, 16, 8


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def on_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "folder", lambda: tmp_path)
    plans.forget()
    model = network().cuda()
    images = torch.randn(6, 16, 8, 8, device="cuda").contiguous(memory_format=torch.channels_last)
    yield model, images
    plans.forget()


@needs_gpu
def test_the_model_and_the_state_around_it_are_left_as_they_were(on_gpu):
    model, images = on_gpu
    model(images).sum().backward()
    before = copy.deepcopy(model.state_dict()), [parameter.grad.clone() for parameter in model.parameters()]
    state, benchmark = torch.cuda.get_rng_state(), torch.backends.cudnn.benchmark
    found = fusedres.tune(model, images)
    assert all(torch.equal(before[0][name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(old, one.grad) for old, one in zip(before[1], model.parameters(), strict=True))
    assert torch.equal(state, torch.cuda.get_rng_state()) and torch.backends.cudnn.benchmark == benchmark
    assert type(model[0]) is BasicBlock
    assert found.path is not None and found.path.exists()
    assert found.step["back"] is not None


@needs_gpu
def test_fuse_goes_by_what_was_measured_and_says_so(on_gpu):
    model, images = on_gpu
    found = fusedres.tune(model, images)
    fusedres.fuse(model)(images).sum().backward()
    rungs = {block["rung"] for block in found.blocks}
    notes = " ".join(row.note for row in fusedres.report(model))
    assert "measured on" in notes and "predicted" not in notes
    assert all(rung in notes for rung in rungs)


@needs_gpu
def test_a_wrong_candidate_and_one_without_memory_are_left_out_on_a_gpu(on_gpu, monkeypatch):
    model, images = on_gpu

    def run(pattern, rung, *, training):
        if rung.name == "prologue":
            raise torch.OutOfMemoryError("tried to allocate")
        z = run_on(pattern, rung, training=training)
        return z * 1.5 if rung.name == "stats" else z

    monkeypatch.setattr(device_module, "run_on", run)
    found = fusedres.tune(model, images)
    for block in found.blocks:
        assert "stats" not in block["ms"] and "differs from fp64" in block["left_out"]["stats"]
        assert block["left_out"]["prologue"] == "out of memory"
        assert "eager" in block["ms"]
