"""fusedres.studies.lesion: what is deleted and put back, and what that costs trained networks."""

from pathlib import Path
from statistics import median

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from fusedres.models import cifar_plain, cifar_resnet
from fusedres.studies import lesion
from fusedres.studies.dissect import blocks_of, dissected
from fusedres.studies.lesion import LESION
from fusedres.studies.study import Row, Table
from fusedres.studies.training import error_of
from fusedres.studies.training import images as digits
from tests.studies.tiny import done, drawn, images, network, table_of, untrained


@pytest.fixture
def model():
    return dissected(network("cifar_resnet20"))


def parts(model):
    return [block.part for block in blocks_of(model)]


def test_blocks_are_deleted_one_by_one_and_put_back(model, monkeypatch):
    seen = []
    monkeypatch.setattr(lesion, "error_of", lambda model, _: seen.append(parts(model)) or 0.25)
    rows = list(lesion.delete_each(model, images(), "name", ["shortcut"]))
    assert seen == [["shortcut" if i == j else "whole" for j in range(9)] for i in range(9)]
    assert rows == [Row("name", i + 1, 0.25) for i in range(9)]
    assert parts(model) == ["whole"] * 9


def test_random_blocks_are_deleted_and_put_back(model, monkeypatch):
    seen = []
    monkeypatch.setattr(lesion, "error_of", lambda model, _: seen.append(parts(model)) or len(seen) / 100)
    rows = list(lesion.delete_some(model, images(), [0, 4, 9], 5, torch.Generator().manual_seed(0)))
    assert [one.count("shortcut") for one in seen] == [0] * 5 + [4] * 5 + [9] * 5
    assert len({tuple(one) for one in seen[5:10]}) > 1
    assert [(row.x, row.value) for row in rows[5:10]] == [(4, value / 100) for value in range(6, 11)]
    assert parts(model) == ["whole"] * 9


def test_every_block_and_every_layer_is_measured_and_drawn():
    networks = {"ResNet-56": network("cifar_resnet20"), "plain-20": network("cifar_plain20")}
    table = table_of(LESION, untrained(LESION, networks, draws=1))
    counts = {series: len(table.of(series)) for series in table.series}
    assert counts == {lesion.RESIDUAL: 1, lesion.BLOCK: 9, lesion.PLAIN: 1, lesion.LAYER: 18, lesion.SOME: 10}
    assert table.at(lesion.SOME, 0).mean == table.at(lesion.RESIDUAL, 0).mean
    assert len(drawn(LESION, table)) == 2


@pytest.mark.parametrize(
    ("residual", "plain", "verdict"),
    [
        ([0.02, 0.02, 0.03, 0.5], [0.7, 0.8, 0.9, 0.9], "agrees"),
        ([0.7, 0.8, 0.9, 0.9], [0.02, 0.02, 0.03, 0.5], "disagrees"),
        ([0.02, 0.1, 0.4, 0.5], [0.02, 0.3, 0.5, 0.6], "not decided"),
    ],
)
def test_a_verdict_asks_that_most_blocks_and_most_layers_differ(residual, plain, verdict):
    rows = [Row(lesion.RESIDUAL, 0, 0.01), Row(lesion.PLAIN, 0, 0.01)]
    rows += [Row(lesion.BLOCK, i, value) for i, value in enumerate(residual)]
    rows += [Row(lesion.LAYER, i, value) for i, value in enumerate(plain)]
    assert LESION.found(Table({0: rows})).verdict == verdict


def trained_shortly(make):
    """Of 14 layers, after 60 steps on digits; with the test images."""
    train, test = digits("digits", "channel", Path())
    torch.manual_seed(0)
    model = make(14, in_channels=1, fused=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(60):
        chosen = torch.randint(len(train.labels), (64,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(train.pixels[chosen]), train.labels[chosen]).backward()
        optimizer.step()
    return dissected(model), test


def test_a_block_of_a_residual_network_costs_a_fifth_of_what_a_layer_of_a_plain_one_does():
    """Points of test error, the median over blocks and over layers; the whole networks err by less than a third."""
    costs = []
    for make, parts in ((cifar_resnet, ["shortcut"]), (cifar_plain, ["without layer 1", "without layer 2"])):
        model, test = trained_shortly(make)
        whole = error_of(model, test)
        assert whole < 1 / 3
        costs.append(median(row.value for row in lesion.delete_each(model, test, "", parts)) - whole)
    residual, plain = costs
    assert residual < plain / 5
    assert plain > 0.3


@pytest.mark.slow
def test_a_trained_residual_network_misses_a_block_less_than_a_plain_one_a_layer(tmp_path):
    finding, rows = done(LESION, tmp_path, draws=2)
    assert finding.verdict == "agrees"
    errors = {row["x"]: float(row["mean"]) for row in rows if row["series"] == lesion.SOME}
    assert errors["0"] < 0.1 < 0.6 < errors["27"]
