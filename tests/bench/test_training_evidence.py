"""fusedres.bench.training_evidence: the page is that of its figures, and what it compares is the same training."""

import argparse
import itertools
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fusedres
from fusedres.bench import training_evidence
from fusedres.bench.training_evidence import (
    NETWORKS,
    SEEDS,
    WAYS,
    Loss,
    Run,
    command,
    differences,
    main,
    mean_and_error,
    page,
    read,
    runs,
    write,
)  # fmt: skip
from fusedres.train.digits import load_digits
from fusedres.train.network import build
from fusedres_cli import train

PAGE = Path(__file__).parents[2] / "docs" / "training-evidence.md"


@pytest.fixture(scope="module")
def rows():
    return read(PAGE.with_suffix(".csv"), Run)


@pytest.fixture(scope="module")
def losses():
    return read(PAGE.with_name("training-evidence-curves.csv"), Loss)


def test_the_page_is_that_of_its_figures(rows, losses):
    assert PAGE.read_text() == page(rows, losses, "training-evidence")


@pytest.mark.parametrize("field", ["test_error", "cpu_seconds"])
def test_another_figure_makes_another_page(rows, losses, field):
    for i_row in range(len(rows)):
        changed = [*rows]
        changed[i_row] = changed[i_row]._replace(**{field: 10 * getattr(rows[i_row], field)})
        assert page(changed, losses, "training-evidence") != PAGE.read_text(), rows[i_row]


def test_another_loss_makes_another_page(rows, losses):
    for i_loss in range(0, len(losses), 39):
        changed = [*losses]
        changed[i_loss] = changed[i_loss]._replace(loss=10.0)
        assert page(rows, changed, "training-evidence") != PAGE.read_text(), losses[i_loss]


def test_every_training_is_there_to_its_last_step(rows, losses):
    assert [row[:3] for row in rows] == runs() and len(rows) == 27
    assert {row.steps for row in rows} == {375}
    looks = [*range(10, 376, 10), 125, 375]  # every tenth step, and the last ones of the epochs; 250 is both
    by_run = itertools.groupby(losses, key=lambda loss: loss[:3])
    assert [(run, [loss.step for loss in curve]) for run, curve in by_run] == [(run, sorted(looks)) for run in runs()]


def test_fused_and_plain_end_within_the_noise(rows):
    by_network = differences(rows, "fused")
    mean, error = mean_and_error([value for values in by_network.values() for value in values])
    assert abs(mean) < 2 * error
    for row in rows:
        assert row.test_error < 0.06, "it has learnt nothing that could be compared"


def test_fused_is_as_near_to_plain_as_plain_in_another_order_of_sums(losses):
    by_run = {}
    for network, way, seed, step, loss in losses:
        by_run.setdefault((network, way, seed), {})[step] = loss

    def apart(way):
        """Mean square over everything."""
        pairs = ((by_run[network, way, seed], by_run[network, "plain", seed]) for network in NETWORKS for seed in SEEDS)
        return statistics.mean((one[step] - other[step]) ** 2 for one, other in pairs for step in one)

    # The ratio of two mean squares of the same spread is within a factor of 2 here: some tens of independent values.
    assert apart("fused") < 2 * apart("reordered")


def built(network, way, dtype):
    name = NETWORKS[network].replace("fusedres/", f"{PAGE.parents[1]}/fusedres/")
    torch.manual_seed(0)
    made = build(name, classes=10, channels=1, fused=way == "fused", schedule=WAYS["fused"][1])
    return made.model.to(dtype).to(memory_format=torch.channels_last), made.channels


def steps(network, way, dtype, count):
    """Losses of some steps of training on digits."""
    model, channels = built(network, way, dtype)
    digits = load_digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    losses = []
    for batch in torch.arange(16 * count).split(16):
        images = digits.train_images[batch].to(dtype).repeat(1, channels, 1, 1)
        images = images.contiguous(memory_format=torch.channels_last)
        loss = torch.nn.functional.cross_entropy(model(images), digits.train_labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("network", NETWORKS)
def test_without_rounding_fused_and_plain_train_alike(network):
    fused, plain = (steps(network, way, torch.float64, 5) for way in ("fused", "plain"))
    assert plain[0] != plain[-1]
    # fp64 rounds by 1e-16; plain-20 multiplies what two roundings differ by with 10 in a step or two.
    assert fused == pytest.approx(plain, rel=1e-10)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_fused_twin_is_fused_throughout_and_starts_with_the_same_weights(network):
    fused, plain = (built(network, way, torch.float32)[0] for way in ("fused", "plain"))
    count = sum(isinstance(module, torch.nn.BatchNorm2d) for module in plain.modules())
    assert str(fusedres.report(fused)).splitlines()[-1] == f"{count} of {count} batch norms fused"
    ours, theirs = fused.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_commands_are_those_of_fusedres_train():
    parser = argparse.ArgumentParser()
    train.add_parser(parser.add_subparsers())
    for network, way, seed in runs():
        options = parser.parse_args(command(network, way, seed))
        assert (options.model, options.seed) == (NETWORKS[network], seed)
        assert (options.plain, options.channels_last) == (way != "fused", way != "reordered")
        assert (options.data, options.epochs, options.threads) == ("mnist5k", training_evidence.EPOCHS, 1)


def test_what_ended_is_not_run_again_and_what_was_cut_short_starts_anew(tmp_path, monkeypatch):
    folder, calls = tmp_path / "run", []

    def ran(arguments, *, cwd, check):
        calls.append(arguments)
        assert check and not folder.exists()
        folder.mkdir()

    monkeypatch.setattr(subprocess, "run", ran)
    monkeypatch.setattr(training_evidence, "machine", lambda device: SimpleNamespace(processor="a CPU", torch="2"))
    folder.mkdir()
    (folder / "checkpoint.pt").touch()
    for _ in range(2):
        training_evidence._train(folder, ["train", "--seed", "3"])
    assert calls == [
        [sys.executable, "-m", "fusedres", "train", "--seed", "3", "--tensorboard", "--out", str(folder)]
    ]  # fmt: skip


@pytest.mark.slow
def test_from_trainings_to_the_page(tmp_path, monkeypatch):
    for package in ("tensorboard", "matplotlib", "sklearn", "rich"):
        pytest.importorskip(package)
    short = ("--data", "digits", "--batch", "16", "--iterations", "12", "--device", "cpu", "--threads", "1")
    monkeypatch.setattr(training_evidence, "COMMON", short)
    monkeypatch.setattr(training_evidence, "NETWORKS", {"cifar_resnet20": "cifar_resnet20"})
    monkeypatch.setattr(training_evidence, "SEEDS", (0, 1))
    out = tmp_path / "some-page.md"
    for _ in range(2):
        assert main(["--out", str(out), "--runs", str(tmp_path / "runs")]) == 0
    rows, losses = read(out.with_suffix(".csv"), Run), read(tmp_path / "some-page-curves.csv", Loss)
    assert [row[:3] for row in rows] == runs() and len(rows) == 6
    assert all(row.steps == 12 and row.cpu_seconds > 0 for row in rows)
    assert [loss.step for loss in losses] == [10, 12] * 6
    first = {loss.way: loss.loss for loss in losses if loss.seed == 0 and loss.step == 10}
    assert first["fused"] == pytest.approx(first["plain"], rel=0.01)
    assert out.read_text() == page(rows, losses, "some-page")
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_rows_survive_their_file(tmp_path):
    rows = [Run("net", "plain", 1, 375, 0.25, 0.5, 0.01, 61.1, "2026-12-01", "a, CPU", 2, "2.14.1")]
    write(tmp_path / "rows.csv", rows)
    assert read(tmp_path / "rows.csv", Run) == rows
