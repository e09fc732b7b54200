"""What can not be read, or not be fused, is left alone with its reason, and computes what it did."""

import re

import pytest
import torch
from torch import nn

import fusedres
from tests.nn.twins import assert_unchanged, randomised, snapshot, tensor
from tests.swap.accounts import assert_same_numbers, norms_called, norms_left, passed
from tests.zoo.hostile import CASES, Case, Collects, Counts, Remembers, WithoutAutocast, hook

SHAPE = (3, 8, 8, 8)
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def made(case: Case) -> nn.Module:
    """Not copied, since some of them hold on to themselves."""
    torch.manual_seed(0)
    return randomised(case.make()).double()


@each_case
def test_numbers_are_those_of_the_plain_block(case):
    assert_same_numbers(fusedres.fuse(made(case)), made(case), tensor(*SHAPE))


@each_case
def test_the_report_says_what_is_left_alone_and_why(case):
    model = fusedres.fuse(made(case))
    left = norms_left(model)
    assert set(left) == set(case.left)
    for name, reason in left.items():
        assert re.search(case.words, reason), f"{name}: {reason!r} says nothing of {case.words!r}"
    torch.manual_seed(1)  # by which no branch is left out
    # The one that the block calls as a function has no call of its own.
    left = set(left) - {"bn1"} if case is CASES["functional norm"] else set(left)
    assert norms_called(model, tensor(*SHAPE)) == left


@each_case
def test_nothing_happens_to_a_block_by_being_read(case):
    model = made(case)
    before, drawn = snapshot(model), torch.get_rng_state()
    had = {name: list(vars(part)) for name, part in model.named_modules()}
    fusedres.report(fusedres.fuse(model))
    assert torch.equal(torch.get_rng_state(), drawn)
    fusedres.unfuse(model)
    assert_unchanged(model, before)
    assert {name: list(vars(part)) for name, part in model.named_modules()} == had


def test_what_a_forward_leaves_behind_is_left_behind():
    x = tensor(*SHAPE)
    for kind in (Remembers, Collects, Counts):
        fused, plain = (made(Case(kind)) for _ in range(2))
        fusedres.fuse(fused)
        for model in (fused, plain):
            passed(model, x), passed(model, x)
        if kind is Remembers:
            torch.testing.assert_close(fused.last, plain.last)
        elif kind is Collects:
            assert len(fused.seen) == len(plain.seen) == 2
            torch.testing.assert_close(fused.seen, plain.seen)
        else:
            assert int(fused.calls) == int(plain.calls) == 2


@pytest.mark.parametrize("kind", ["forward", "before", "backward"])
@pytest.mark.parametrize("layer", ["conv1", "bn1", "conv2", "bn2"])
def test_a_hook_that_comes_later_is_called_from_then_on(layer, kind):
    fused, plain = (made(CASES["tied weights"]) for _ in range(2))
    fusedres.fuse(fused)
    x = tensor(*SHAPE)
    assert_same_numbers(fused, plain, x)
    for model in (fused, plain):
        hook(model.get_submodule(layer), kind)
    assert_same_numbers(fused, plain, x)
    assert layer in norms_left(fused)[f"bn{layer[-1]}"]


def test_a_region_without_autocast_stays_one():
    fused, plain = (made(Case(WithoutAutocast)).float() for _ in range(2))
    fusedres.fuse(fused)
    x = tensor(*SHAPE, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fused(x), plain(x)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
