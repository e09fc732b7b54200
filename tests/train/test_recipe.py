"""fusedres.train.recipe and .rate: the numbers of the papers, and the learning rate of every step."""

import dataclasses
from dataclasses import asdict
from typing import NamedTuple

import pytest
import torch

from fusedres.train.checkpoint import flat
from fusedres.train.rate import LearningRate
from fusedres.train.recipe import Drops, OneCycle, Plateau, names, recipe


def rates(name, *, steps_per_epoch, layers=20, **changes):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    return LearningRate(dataclasses.replace(recipe(name), **changes), optimizer, steps_per_epoch, layers)


class Facts(NamedTuple):
    """What a paper states, by the section that does, and the fields of which it says nothing."""

    stated: dict[str, dict[str, object]]
    unstated: set[str]


TENTH = pytest.approx(1 / 10)
HE_CROP = {"crop.sides": (256, 480), "crop.size": 224, "crop.test_sides": (224, 256, 384, 480, 640)}

# From the papers and not from the recipes. "The same as" another paper is written out, under the section that says so.
FACTS = {
    "he2015-cifar": Facts(
        {
            "He 2015, 4.2": {
                "batch": 128, "lr": 0.1, "schedule.at": (32_000, 48_000), "schedule.factor": TENTH,
                "unit": "iterations", "length": 64_000, "weight_decay": 0.0001, "momentum": 0.9, "crop.pad": 4,
                "crop.flip": True, "mean": "pixel", "warm_up.lr": 0.01, "warm_up.until_error": 80 / 100,
                "warm_up.min_layers": 6 * 18 + 2,
            },
        },
        {"nesterov", "crop.mode", "warm_up.fraction"},
    ),
    "he2015-imagenet": Facts(
        {
            "He 2015, 3.4": {
                "batch": 256, "lr": 0.1, "schedule.factor": TENTH, "unit": "iterations", "length": 60 * 10**4,
                "weight_decay": 0.0001, "momentum": 0.9, "mean": "pixel", "warm_up": None, **HE_CROP,
            },
            "Krizhevsky 2012, 2 and 4.1": {"crop.test_side": 256, "crop.colour": 0.1},
        },
        {"nesterov", "schedule.patience"},
    ),
    "he2016-preact": Facts(
        {
            "He 2016, appendix": {
                "batch": 2 * 64, "lr": 0.1, "schedule.at": (32_000, 48_000), "schedule.factor": TENTH,
                "unit": "iterations", "weight_decay": 0.0001, "momentum": 0.9, "crop.pad": 4, "crop.flip": True,
                "warm_up.lr": 0.01, "warm_up.fraction": 400 / 64_000, "warm_up.until_error": None,
                "warm_up.min_layers": 0,
            },
        },
        {"nesterov", "crop.mode", "length", "mean"},
    ),
    "he2016-preact-imagenet": Facts(
        {
            "He 2016, appendix": {
                "batch": 8 * 32, "lr": 0.1, "warm_up": None, "unit": "epochs", "schedule.at": (30, 60),
                "schedule.factor": TENTH, "weight_decay": 0.0001, "momentum": 0.9, "crop.colour": 0.1, **HE_CROP,
            },
        },
        {"nesterov", "length", "mean", "crop.test_side"},
    ),
    "stochastic-depth": Facts(
        {
            "Huang 2016, 4": {
                "unit": "epochs", "length": 500, "batch": 128, "lr": 0.1, "schedule.at": (250, 375),
                "schedule.factor": TENTH, "weight_decay": 1e-4, "momentum": 0.9, "nesterov": True, "crop.pad": 4,
                "crop.flip": True, "warm_up": None,
            },
        },
        {"mean", "crop.mode"},
    ),
    "wide-resnet": Facts(
        {
            "Zagoruyko 2016, 3": {
                "nesterov": True, "lr": 0.1, "weight_decay": 0.0005, "momentum": 0.9, "batch": 128, "unit": "epochs",
                "schedule.at": (60, 120, 160), "schedule.factor": 0.2, "length": 200, "crop.flip": True, "crop.pad": 4,
                "crop.mode": "reflect", "warm_up": None,
            },
        },
        {"mean"},
    ),
    "resnext-cifar": Facts(
        {
            "Xie 2017, A": {
                "batch": 128, "weight_decay": 0.0005, "momentum": 0.9, "lr": 0.1, "unit": "epochs", "length": 300,
                "schedule.at": (150, 225), "crop.pad": (40 - 32) // 2, "crop.mode": "zero", "crop.flip": True,
                "warm_up": None,
            },
        },
        {"nesterov", "mean", "schedule.factor"},
    ),
    "densenet": Facts(
        {
            "Huang 2017, 4.1": {"mean": "channel", "crop.flip": True},
            "Huang 2017, 4.2": {
                "batch": 64, "unit": "epochs", "length": 300, "lr": 0.1, "schedule.at": (0.5 * 300, 0.75 * 300),
                "schedule.factor": TENTH, "weight_decay": 10**-4, "nesterov": True, "momentum": 0.9, "warm_up": None,
            },
        },
        {"crop.pad", "crop.mode"},
    ),
    "densenet-imagenet": Facts(
        {
            "Huang 2017, 4.1": {"crop.size": 224},
            "Huang 2017, 4.2": {
                "unit": "epochs", "length": 90, "batch": 256, "lr": 0.1, "schedule.at": (30, 60),
                "schedule.factor": TENTH, "weight_decay": 10**-4, "nesterov": True, "momentum": 0.9, "warm_up": None,
            },
        },
        {"mean", "crop.sides", "crop.test_side", "crop.test_sides", "crop.colour"},
    ),
}  # fmt: skip


def fields(name):
    """All numbers of a recipe, those of its parts named with dots."""
    return {key: value for key, value in flat(asdict(recipe(name))).items() if key not in ("name", "source")}


def test_every_recipe_of_a_paper_has_its_facts():
    assert set(names()) - set(FACTS) == {"digits"}
    assert recipe("digits").source == "this library"


@pytest.mark.parametrize("name", FACTS)
def test_every_number_is_the_paper_s_or_one_that_it_does_not_state(name):
    stated, unstated = FACTS[name]
    facts = [(field, fact) for section in stated.values() for field, fact in section.items()]
    assert sorted([*(field for field, _ in facts), *unstated]) == sorted(fields(name)), "each field once"
    assert {field: fields(name)[field] for field, _ in facts} == dict(facts)


# Steps in all, and (step, rate) pairs around every change. A CIFAR epoch of 50,000 images has 390 full batches of 128
# and 781 of 64, of He's 45,000 it has 351; one of ImageNet 5,004 of 256.
@pytest.mark.parametrize(
    ("name", "steps_per_epoch", "total", "expected"),
    [
        ("he2015-cifar", 351, 64_000,
         {0: 0.1, 31_999: 0.1, 32_000: 0.01, 47_999: 0.01, 48_000: 0.001, 63_999: 0.001}),
        ("he2016-preact", 390, 64_000,
         {0: 0.01, 399: 0.01, 400: 0.1, 31_999: 0.1, 32_000: 0.01, 48_000: 0.001}),
        ("he2016-preact-imagenet", 5004, 90 * 5004,
         {0: 0.1, 30 * 5004 - 1: 0.1, 30 * 5004: 0.01, 60 * 5004: 0.001}),
        ("densenet", 781, 300 * 781, {0: 0.1, 150 * 781 - 1: 0.1, 150 * 781: 0.01, 225 * 781: 0.001}),
        ("densenet-imagenet", 5004, 90 * 5004, {0: 0.1, 30 * 5004: 0.01, 60 * 5004: 0.001}),
        ("wide-resnet", 390, 200 * 390, {0: 0.1, 60 * 390: 0.02, 120 * 390: 0.004, 160 * 390: 0.0008}),
        ("resnext-cifar", 390, 300 * 390, {0: 0.1, 150 * 390: 0.01, 225 * 390: 0.001}),
        ("stochastic-depth", 390, 500 * 390, {0: 0.1, 250 * 390: 0.01, 375 * 390: 0.001}),
    ],
)  # fmt: skip
def test_the_rate_of_every_step_is_that_of_the_paper(name, steps_per_epoch, total, expected):
    rate = rates(name, steps_per_epoch=steps_per_epoch)
    assert rate.total == total
    assert {step: rate.before(step) for step in expected} == pytest.approx(expected)
    assert rate.optimizer.param_groups[0]["lr"] == pytest.approx(expected[max(expected)])


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
