"""Turns among candidates while a model trains: when they are taken, how they are timed, and what stays in the end."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres.patterns.choose import Choice, candidates_for
from fusedres.patterns.online import MOST_TURNS, TURNS, Online
from fusedres.plan.decisions import BLOCK, Site
from fusedres.runtime import fallback
from fusedres.runtime.launch import LaunchFailed

SITE = Site(BLOCK, "a block", 8)
MS = {"eager": 3.0, "block_end": 2.0, "stats": 1.0, "prologue": 1.5, "moments": 4.0}


class Stream:
    """A GPU's clock; what was recorded has happened once ``done`` says so."""

    def __init__(self):
        self.now, self.done = 0.0, True

    def event(self):
        return Event(self)


class Event:
    def __init__(self, stream):
        self.stream, self.at = stream, None

    def record(self):
        self.at = self.stream.now

    def query(self):
        return self.stream.done

    def elapsed_time(self, end):
        return end.at - self.at


class Pattern:
    def __init__(self, x, weight):
        self.x, self.tensors = x, (weight,)


class Owner(nn.Module):
    """A block that multiplies by a weight; forward and backward pass take as long as its rung says."""

    def __init__(self, online, stream, ms):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.online, self.stream, self.ms = online, stream, ms
        self.taken = []

    def forward(self, x):
        def on(choice):
            name = choice.schedule.name
            self.taken.append(name)
            took = self.ms[name]
            if isinstance(took, Exception):
                raise took

            class Multiply(torch.autograd.Function):
                @staticmethod
                def forward(context, x, weight):
                    context.save_for_backward(x, weight)
                    self.stream.now += took / 3
                    return x * weight

                @staticmethod
                def backward(context, grad):
                    x, weight = context.saved_tensors
                    self.stream.now += took * 2 / 3
                    return grad * weight, (grad * x).sum(0)

            return Multiply.apply(x, self.weight)

        def predicted():
            return Choice(candidates_for(True)["prologue"], "predicted", {}, {})

        return self.online.run(SITE, Pattern(x, self.weight), self, predicted, on)


def block(ms=None):
    stream = Stream()
    return Owner(Online(stream.event), stream, ms or MS), stream


def step(owner, x=None):
    x = torch.ones(2, 3) if x is None else x
    z = owner(x)
    z.sum().backward()
    return z


def test_each_candidate_has_its_turns_and_the_fastest_stays():
    owner, _ = block()
    for _ in range(TURNS * len(MS) + 10):
        step(owner)
    turns = owner.taken[: TURNS * len(MS)]
    assert Counter(turns) == dict.fromkeys(MS, TURNS)
    assert set(owner.taken[TURNS * len(MS) :]) == {"stats"}


def test_the_slow_first_turn_is_not_counted():
    owner, _ = block()

    class Slow(dict):
        def __getitem__(self, name):
            return super().__getitem__(name) + (100 if owner.taken.count(name) == 1 and name == "stats" else 0)

    owner.ms = Slow(MS)
    for _ in range(TURNS * len(MS) + 1):
        step(owner)
    assert owner.taken[-1] == "stats"
    assert owner.online._blocks[SITE].choice.reason.startswith("measured while training: stats 1 ms")


def test_numbers_are_those_of_a_pass_and_parameters_keep_no_hooks():
    owner, _ = block()
    x = torch.randn(2, 3)
    for _ in range(2 * len(MS)):
        owner.weight.grad = None
        assert torch.equal(step(owner, x), x)
        assert torch.equal(owner.weight.grad, x.sum(0))
    assert not owner.weight._backward_hooks


def test_nobody_waits_for_events():
    owner, stream = block()
    stream.done = False  # the GPU is far behind
    for _ in range(MOST_TURNS * len(MS) + 20):
        step(owner)
    assert owner.online._blocks[SITE].choice is None
    assert owner.taken[-20:] == ["prologue"] * 20  # what is predicted, meanwhile
    stream.done = True
    step(owner)
    step(owner)
    assert owner.taken[-1] == "stats"


def test_calls_without_a_backward_pass_end_in_what_is_predicted():
    owner, _ = block()
    for _ in range(MOST_TURNS * len(MS) + 5):
        owner(torch.ones(2, 3))
    assert owner.taken[-5:] == ["prologue"] * 5


@pytest.mark.parametrize("error", [LaunchFailed("kernel", "cuda:0", RuntimeError("x")), torch.OutOfMemoryError("no")])
def test_a_candidate_that_fails_is_left_out_and_its_traces_are_wiped_away(error, monkeypatch):
    monkeypatch.setattr("fusedres.runtime.switches.STRICT", False)
    owner, _ = block(MS | {"stats": error})
    counter = torch.zeros(())
    inner = owner.forward

    def forward(x):
        counter.add_(1)
        return inner(x)

    owner.fused_failure = None
    for i in range(TURNS * len(MS)):
        z = fallback.attempt(owner, lambda: [counter], lambda: forward(torch.ones(2, 3)), kernels=True)
        z.sum().backward()
        assert int(counter) == i + 1 or owner.taken.count("stats") == 1
    assert owner.taken.count("stats") == 1
    assert owner.taken[-1] == "prologue"  # the fastest of the others
    assert "stats" in owner.online._blocks[SITE].left_out


def test_under_checkpointing_a_recomputation_takes_the_rung_of_its_forward_pass():
    owner, _ = block()
    x = torch.ones(2, 3, requires_grad=True)
    for i in range(2 * TURNS * len(MS)):
        if i % 2:
            step(owner)
            continue
        owner.taken.clear()
        checkpoint(owner, x, use_reentrant=False).sum().backward()
        forward, again = owner.taken
        assert forward == again


def test_copies_and_pickles_know_nothing():
    owner, _ = block()
    for _ in range(TURNS * len(MS) + 1):
        step(owner)
    for other in (copy.deepcopy(owner.online), pickle.loads(pickle.dumps(owner.online))):
        assert not other._blocks


def test_fuse_sets_it_and_refuses_what_it_does_not_know():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18()
    fusedres.fuse(model, tune="online")
    found = {module.fused_online for module in model.modules() if hasattr(module, "fused_online")}
    assert len(found) == 1 and isinstance(next(iter(found)), Online)
    copy.deepcopy(model)
    fusedres.fuse(model)
    assert all(module.fused_online is None for module in model.modules() if hasattr(module, "fused_online"))
    fusedres.unfuse(fusedres.fuse(model, tune="online"))
    assert not any("fused_online" in vars(module) for module in model.modules())
    with pytest.raises(ValueError, match="tune: expected 'online' or None, got 'offline'"):
        fusedres.fuse(model, tune="offline")
    with pytest.raises(ValueError, match="tune: expected schedule='auto' with it, which leaves a choice, got 'stats'"):
        fusedres.fuse(model, schedule="stats", tune="online")
