"""fusedres.studies.compared: networks that differ in one thing, and rules for what that decides."""

import pytest
from torch import nn

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from fusedres.models.network import library
from fusedres.models.variants import variant_resnet
from fusedres.studies.compared import alike, built, compare, ends, in_words, labels, together
from fusedres.studies.study import Lab, Point, Setting
from fusedres.studies.training import Trained
from fusedres.train.logs import Epoch
from fusedres.train.recipe import recipe
from tests.studies.made_up import errors, table


def points(*deviations, samples=3):
    return [Point("a", 0, 0.5, std, 0.5, samples) for std in deviations]


@pytest.mark.parametrize(
    "gap, deviations, verdict",
    [
        (0.011, (0, 0), "agrees"),
        (0.009, (0, 0), "not decided"),
        (-0.009, (0, 0), "not decided"),
        (-0.011, (0, 0), "disagrees"),
        (0.11, (0.05, 0.05), "agrees"),
        (0.09, (0.05, 0.05), "not decided"),
        (-0.09, (0.05, 0.05), "not decided"),
        (-0.11, (0.05, 0.05), "disagrees"),
    ],
)
def test_a_gap_is_held_to_the_margin_and_to_the_deviations(gap, deviations, verdict):
    assert compare(gap, points(*deviations)) == verdict


@pytest.mark.parametrize(
    "gap, deviations, samples, verdict",
    [
        (0.005, (0.005, 0.005), 3, "agrees"),
        (-0.005, (0.005, 0.005), 3, "agrees"),
        (0.015, (0.005, 0.005), 3, "not decided"),
        (0.0, (0.0, 0.0), 1, "not decided"),
        (0.035, (0.005, 0.005), 3, "disagrees"),
        (-0.035, (0.005, 0.005), 3, "disagrees"),
    ],
)
def test_what_is_alike_is_so_with_its_deviations(gap, deviations, samples, verdict):
    assert alike(gap, points(*deviations, samples=samples)) == verdict


def test_a_claim_holds_if_all_of_it_does():
    assert together(["agrees", "agrees"]) == "agrees"
    assert together(["agrees", "not decided"]) == "not decided"
    assert together(["not decided", "agrees", "disagrees"]) == "disagrees"


def test_one_that_diverged_ends_at_chance(tmp_path):
    epoch = Epoch(1, 23, 0.1, 1.0, 0.4, 1.0, 0.3, 0.1, 1.0, 1.0, 1.0)
    networks = {
        "a": Trained(nn.Identity(), [epoch]), "b": Trained(nn.Identity(), [epoch], True),
        "c": Trained(nn.Identity(), [], True),
    }  # fmt: skip
    rows = list(ends(Lab(Setting(), 0, networks, recipe("digits"), tmp_path)))
    assert rows == [("a", 0, 0.3), ("b", 0, 0.9), ("c", 0, 0.9)]


def test_labels_are_those_with_one_number():
    rows = table({"a": [0.1, 0.3], "b, 20": [0.5, 0.5]}, errors(["a", "b, 20"]))
    assert labels(rows) == ["a", "b, 20"]
    assert in_words(rows, labels(rows)) == "20.0% ± 14.1% for a; 50.0% ± 0.0% for b, 20"
    assert in_words(table({"a": [0.1]}), ["a"]) == "10.0% for a"


@pytest.mark.parametrize("fused", [False, True])
def test_a_network_is_built_fused_or_plain(fused):
    model = built("a", variant_resnet, 8, "constant_scaling", shortcut_scale=0.25).make(
        classes=7, channels=1, fused=fused
    )
    (block,) = model.layer1
    assert type(block) is library(fused).ScaledBlock
    assert (block.shortcut_scale, model.fc.out_features, model.conv1.in_channels) == (0.25, 7, 1)
