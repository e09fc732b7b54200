"""fusedres.studies.ensembles: what is deleted, permuted and differentiated, on a network with known answers."""

import csv
import math
import sys

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from fusedres.commands.main import main
from fusedres.studies import ensembles, shattered
from fusedres.studies.dissect import blocks_of, dissected_resnet
from fusedres.studies.training import Images, error_of


@pytest.fixture
def model():
    torch.manual_seed(0)
    return dissected_resnet("cifar_resnet20").eval()


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return Images(torch.randn(40, 1, 8, 8, generator=generator), torch.arange(40) % 10)


def parts(model):
    return [block.part for block in blocks_of(model)]


def test_blocks_are_deleted_one_by_one_and_put_back(model, images, monkeypatch):
    seen = []
    monkeypatch.setattr(ensembles, "error_of", lambda model, _: seen.append(parts(model)) or 0.25)
    points = ensembles.delete_each(model, images, "name")
    assert seen == [["shortcut" if i == j else "whole" for j in range(9)] for i in range(9)]
    assert [(point.x, point.mean) for point in points] == [(i, 0.25) for i in range(9)]
    assert parts(model) == ["whole"] * 9


def test_random_blocks_are_deleted_and_put_back(model, images, monkeypatch):
    seen = []
    monkeypatch.setattr(ensembles, "error_of", lambda model, _: seen.append(parts(model)) or len(seen) / 100)
    points = ensembles.delete_some(model, images, [0, 4, 9], 5, seed=0)
    assert [one.count("shortcut") for one in seen] == [0] * 5 + [4] * 5 + [9] * 5
    assert len({tuple(one) for one in seen[5:10]}) > 1
    assert points[1].mean == pytest.approx(0.08)
    assert points[1].std == pytest.approx(math.sqrt(2) / 100)
    assert parts(model) == ["whole"] * 9


def test_blocks_of_one_shape_change_places_and_come_back(model, images):
    own = [block.block for block in blocks_of(model)]
    before = error_of(model, images)
    points = ensembles.shuffle_some(model, images, [1, 8], 6, seed=0)
    assert [block.block for block in blocks_of(model)] == own
    assert error_of(model, images) == before
    assert all(-1 <= point.x <= 1 for point in points)
    assert min(point.x for point in points) < 0.9
    # One swap of neighbours disorders one of 36 pairs, of blocks two apart three.
    assert {round(36 * (1 - point.x) / 2) for point in points[:6]} <= {1, 3}


@pytest.mark.parametrize(("order", "tau"), [([0, 1, 2, 3], 1), ([3, 2, 1, 0], -1), ([1, 0, 2, 3], 4 / 6)])
def test_kendall(order, tau):
    assert ensembles.kendall(order) == pytest.approx(tau)


def test_gradients_of_all_paths_sum_to_the_gradient(model, images):
    """Over all subsets of blocks, paths add up to the whole; the study samples them."""
    model = model.double()
    for block in blocks_of(model)[3:]:
        block.part = "shortcut"  # leaves three blocks, eight paths
    x = images.pixels.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy
    (whole,) = torch.autograd.grad(loss(model(x), images.labels), x)
    total = torch.zeros_like(whole)
    for choice in range(8):
        for i in range(3):
            chosen = "gradient by residual" if choice >> i & 1 else "gradient by shortcut"
            blocks_of(model)[i].part = chosen
        total += torch.autograd.grad(loss(model(x), images.labels), x)[0]
    torch.testing.assert_close(total, whole)


def test_lengths_of_paths_are_binomial_and_weigh_the_gradients(model, images):
    points = ensembles.path_gradients(model, images, 3, seed=0)
    of = {name: [point.mean for point in points if point.experiment == name] for name in
          ("gradient of a path", "share of paths", "share of gradient")}  # fmt: skip
    assert of["share of paths"] == [math.comb(9, k) / 512 for k in range(10)]
    weights = [a * b for a, b in zip(of["gradient of a path"], of["share of paths"], strict=True)]
    assert of["share of gradient"] == pytest.approx([weight / sum(weights) for weight in weights])
    # All shortcuts, or all residuals: one path each.
    assert points[0].std == points[9].std == 0
    assert parts(model) == ["whole"] * 9
    assert ensembles.middle(points, "share of paths") == (2, 7)


@pytest.mark.parametrize("epochs", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_the_study_trains_deletes_and_writes(tmp_path, capsys, epochs):
    draws = 1 if epochs == 1 else 4
    arguments = ["--model", "cifar_resnet20", "--epochs", str(epochs), "--draws", str(draws), "--out", str(tmp_path)]
    assert main(["study", "ensembles", *arguments]) == 0
    with (tmp_path / "ensembles.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    counts = {name: sum(row["experiment"] == name for row in rows) for name in {row["experiment"] for row in rows}}
    assert counts == {
        "delete a residual block": 9, "delete a plain block": 9, "delete random blocks": 10,
        "permute blocks": 6 * draws,
        "gradient of a path": 10, "share of paths": 10, "share of gradient": 10,
    }  # fmt: skip
    errors = [float(row["mean"]) for row in rows if row["experiment"] == "delete random blocks"]
    if epochs > 1:  # one block of many is hardly missed, all of them are
        assert errors[0] < 0.1 < 0.6 < errors[-1]
        one, plain = (
            sorted(float(row["mean"]) for row in rows if row["experiment"] == f"delete a {kind} block")[4]
            for kind in ("residual", "plain")
        )
        assert one < 0.1 < 0.3 < plain
    assert (tmp_path / "ensembles.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "90 % of the gradient" in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_refused(capsys):
    assert main(["study", "shattered", "--out", "/nowhere"]) == 2
    assert "out must be an existing folder" in capsys.readouterr().err


def test_a_study_without_matplotlib_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ensembles, "run", lambda *_, **__: pytest.fail("work was begun"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["study", "ensembles", "--out", str(tmp_path)]) == 1
    assert "matplotlib not installed: pip install fusedres[cli]" in capsys.readouterr().err


@pytest.mark.parametrize("study", ["ensembles", "shattered"])
def test_a_plain_network_is_refused_before_any_work(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ensembles, "train_on_digits", lambda *_, **__: pytest.fail("work was begun"))
    monkeypatch.setattr(shattered, "network_gradient", lambda *_, **__: pytest.fail("work was begun"))
    assert main(["study", study, "--model", "cifar_plain20", "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "model: expected a network with shortcuts such as cifar_resnet20, got 'cifar_plain20'" in printed.err
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []
