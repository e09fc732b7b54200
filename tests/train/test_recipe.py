"""fusedres.train.recipe and .rate: the numbers of the papers, and the learning rate of every step."""

import dataclasses

import pytest
import torch

from fusedres.train.rate import LearningRate
from fusedres.train.recipe import Drops, OneCycle, Plateau, names, recipe


def rates(name, *, steps_per_epoch, layers=20, **changes):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    return LearningRate(dataclasses.replace(recipe(name), **changes), optimizer, steps_per_epoch, layers)


# Name, batch, weight decay, Nesterov, steps in all, and (step, rate) pairs around every change; from the sections
# named in the recipes. A CIFAR epoch of 50,000 images has 390 full batches of 128 and 781 of 64.
@pytest.mark.parametrize(
    ("name", "steps_per_epoch", "batch", "decay", "nesterov", "total", "expected"),
    [
        ("he2015-cifar", 351, 128, 1e-4, False, 64_000,
         {0: 0.1, 31_999: 0.1, 32_000: 0.01, 47_999: 0.01, 48_000: 0.001, 63_999: 0.001}),
        ("he2016-preact", 390, 128, 1e-4, False, 64_000,
         {0: 0.01, 399: 0.01, 400: 0.1, 31_999: 0.1, 32_000: 0.01, 48_000: 0.001}),
        ("he2016-preact-imagenet", 5004, 256, 1e-4, False, 90 * 5004,
         {0: 0.1, 30 * 5004 - 1: 0.1, 30 * 5004: 0.01, 60 * 5004: 0.001}),
        ("densenet", 781, 64, 1e-4, True, 300 * 781, {0: 0.1, 150 * 781 - 1: 0.1, 150 * 781: 0.01, 225 * 781: 0.001}),
        ("densenet-imagenet", 5004, 256, 1e-4, True, 90 * 5004, {0: 0.1, 30 * 5004: 0.01, 60 * 5004: 0.001}),
        ("wide-resnet", 390, 128, 5e-4, True, 200 * 390,
         {0: 0.1, 60 * 390: 0.02, 120 * 390: 0.004, 160 * 390: 0.0008}),
        ("resnext-cifar", 390, 128, 5e-4, True, 300 * 390, {0: 0.1, 150 * 390: 0.01, 225 * 390: 0.001}),
        ("stochastic-depth", 390, 128, 1e-4, True, 500 * 390, {0: 0.1, 250 * 390: 0.01, 375 * 390: 0.001}),
    ],
)  # fmt: skip
def test_numbers_of_the_papers(name, steps_per_epoch, batch, decay, nesterov, total, expected):
    found = recipe(name)
    assert (found.batch, found.weight_decay, found.nesterov, found.momentum) == (batch, decay, nesterov, 0.9)
    rate = rates(name, steps_per_epoch=steps_per_epoch)
    assert rate.total == total
    assert {step: rate.before(step) for step in expected} == pytest.approx(expected)
    assert rate.optimizer.param_groups[0]["lr"] == pytest.approx(expected[max(expected)])


def test_he2015_imagenet():
    found = recipe("he2015-imagenet")
    assert (found.batch, found.length, found.unit, found.lr) == (256, 600_000, "iterations", 0.1)
    assert isinstance(found.schedule, Plateau)
    assert (found.crop.sides, found.crop.size, found.crop.test_side) == ((256, 480), 224, 256)
    assert found.crop.test_sides == (224, 256, 384, 480, 640)
    assert found.crop.colour == 0.1
    assert found.mean == "pixel"


def test_110_layers_warm_up_until_the_training_error_is_below_80_percent():
    rate = rates("he2015-cifar", steps_per_epoch=351, layers=110)
    assert rate.before(0) == 0.01
    rate.observe(0.81)
    assert rate.before(390) == 0.01
    rate.observe(0.79)
    assert rate.before(400) == 0.1
    rate.observe(0.9)  # the warm-up does not come back
    assert rate.before(401) == 0.1
    assert rates("he2015-cifar", steps_per_epoch=351, layers=56).before(0) == 0.1


def test_plateau_divides_the_rate_after_its_patience():
    rate = rates("he2015-imagenet", steps_per_epoch=10, schedule=Plateau(patience=2))
    seen = []
    for epoch, error in enumerate((0.9, 0.8, 0.8, 0.85, 0.8, 0.7, 0.7, 0.7, 0.7)):
        seen.append(rate.before(epoch * 10))
        rate.after_epoch(error)
    assert seen == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01])
    assert rate.before(90) == pytest.approx(0.001)


@pytest.mark.parametrize("name", ["he2015-cifar", "he2015-imagenet"])
def test_a_restored_rate_goes_on_where_it_was(name):
    whole, first = (rates(name, steps_per_epoch=10, layers=200, schedule=Plateau(patience=1)) for _ in range(2))
    second = rates(name, steps_per_epoch=10, layers=200, schedule=Plateau(patience=1))
    errors = [0.9, 0.7, 0.7, 0.7, 0.6, 0.6, 0.6, 0.6]
    expected, got = [], []
    for epoch, error in enumerate(errors):
        if epoch == 3:
            second.load_state_dict(first.state_dict())
        split = first if epoch < 3 else second
        for rate, seen in ((whole, expected), (split, got)):
            seen.append(rate.before(epoch * 10))
            rate.observe(error)
            rate.after_epoch(error)
    assert got == expected
    assert len(set(expected)) > 2


def test_one_cycle_rises_then_falls_to_nothing():
    rate = rates("digits", steps_per_epoch=22)
    assert isinstance(recipe("digits").schedule, OneCycle)
    values = [rate.before(step) for step in range(rate.total)]
    peak = values.index(max(values))
    assert peak == round(0.2 * rate.total)
    assert max(values) == pytest.approx(0.1)
    assert values[0] == pytest.approx(0.004)
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)
    assert 0 < values[-1] < 1e-5


def test_another_length_moves_the_drops_in_proportion():
    short = recipe("he2015-cifar").lasting(640, "iterations")
    assert short.schedule == Drops((320, 480))
    days = recipe("he2015-cifar").lasting(10, "epochs")
    assert (days.unit, days.length, days.schedule.at) == ("epochs", 10, (5, 7.5))
    rate = rates("he2016-preact", steps_per_epoch=1, length=640)
    assert [rate.before(step) for step in (0, 3, 4)] == [0.01, 0.01, 0.1]


def test_every_recipe_names_its_source_and_unknown_ones_are_refused():
    assert {recipe(name).name for name in names()} == set(names())
    assert all(recipe(name).source for name in names())
    with pytest.raises(ValueError, match=r"recipe: expected one of he2015-cifar, .*, got 'adam'"):
        recipe("adam")


def test_a_rate_that_is_a_tensor_is_written_to():
    held = torch.tensor(0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=held, fused=True)
    rate = LearningRate(recipe("he2015-cifar").lasting(4, "epochs"), optimizer, 2, layers=20)
    seen = [(rate.before(step), float(held)) for step in range(rate.total)]
    assert optimizer.param_groups[0]["lr"] is held
    assert all(written == pytest.approx(asked) for asked, written in seen)
    assert len({asked for asked, _ in seen}) > 1
