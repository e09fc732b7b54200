"""fusedres.plan: the ladder, and which rung and form a layer gets."""

import dataclasses

import pytest
import torch

from fusedres.operands import Geometry, Layer
from fusedres.patterns.choose import AUTO, LIBRARY, chain_schedule, check_schedule, use_moments
from fusedres.plan.schedule import SCHEDULES
from fusedres.runtime.call import Call


def test_each_rung_of_the_ladder_adds_to_the_one_before():
    assert list(SCHEDULES) == ["block_end", "stats", "prologue", "moments"]
    parts = [(s.statistics, s.prologue, s.moments) for s in SCHEDULES.values()]
    assert parts == [
        (False, False, False),
        (True, False, False),
        (True, True, False),
        (True, True, True),
    ]
    assert all(schedule.bit_masks for schedule in SCHEDULES.values())
    assert all(schedule.name == name for name, schedule in SCHEDULES.items())


def test_a_schedule_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SCHEDULES["moments"].moments = False


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize("kernels", [False, True])
def test_a_rung_that_was_asked_for_is_what_runs(name, kernels):
    assert chain_schedule(name, kernels=kernels) is SCHEDULES[name]


def test_auto_is_the_library_where_no_kernels_run():
    assert chain_schedule(AUTO, kernels=False) is LIBRARY
    assert chain_schedule(AUTO, kernels=True) is SCHEDULES["prologue"]


@pytest.mark.parametrize("name", [AUTO, *SCHEDULES])
def test_known_names_pass(name):
    check_schedule(name)


@pytest.mark.parametrize("name", ["", "Moments", "eager", "block-end"])
def test_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"schedule: expected one of .*'auto'.*'moments'.*, got") as raised:
        check_schedule(name)
    assert repr(name) in str(raised.value)


# weight (K, C/groups, R, S), geometry, on the moments rung, under auto, reason
MOMENTS = [
    ((256, 64, 1, 1), Geometry(), True, True, "end of a bottleneck"),
    ((256, 64, 1, 1), Geometry(stride=(2, 2)), True, True, "strided"),
    ((128, 64, 1, 1), Geometry(), True, False, "C = K / 2: saves memory but not time"),
    ((96, 64, 1, 1), Geometry(), False, False, "C > K / 2: moments cost more than the convolution's output"),
    ((64, 256, 1, 1), Geometry(), False, False, "conv1 of a bottleneck"),
    ((64, 16, 3, 3), Geometry(padding=(1, 1)), False, False, "3x3"),
    ((64, 16, 1, 3), Geometry(), False, False, "1x3"),
    ((64, 16, 1, 1), Geometry(padding=(1, 1)), False, False, "padding adds pixels that are not of the input"),
    ((64, 16, 1, 1), Geometry(groups=2), False, False, "grouped"),
]


@pytest.mark.parametrize(("weight", "geometry", "rung", "auto", "reason"), MOMENTS, ids=[m[-1] for m in MOMENTS])
@pytest.mark.parametrize("kernels", [False, True])
def test_moments_form(weight, geometry, rung, auto, reason, kernels):
    layer = Layer(torch.zeros(weight), geometry)

    def uses(requested, dtype, kernels):
        return use_moments(requested, layer, Call(dtype, kernels=kernels))

    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert uses("moments", dtype, kernels) is rung
        assert not any(uses(name, dtype, kernels) for name in ("block_end", "stats", "prologue"))
    assert uses(AUTO, torch.float32, False) is auto
    assert not uses(AUTO, torch.float32, True)
    # The library has no call for the moments of 16-bit tensors.
    assert not uses(AUTO, torch.bfloat16, False)
