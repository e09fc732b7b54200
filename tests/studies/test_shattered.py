"""fusedres.studies.shattered: the autocorrelation of known signals, gradients, and what the paper finds."""

import csv
import math

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from fusedres.commands.main import main
from fusedres.studies import shattered


def test_autocorrelation_of_a_wave_is_a_cosine():
    wave = torch.sin(torch.arange(256) * 2 * math.pi / 32)[None]
    curve = shattered.autocorrelation(wave)
    exact = torch.cos(torch.arange(128) * 2 * math.pi / 32).double()
    # The mean over N − lag points of a wave of twice the frequency is at most 1/((N − lag)·sin ω), and 0 over periods.
    assert (curve - exact).abs().max() < 1 / (128 * math.sin(2 * math.pi / 32))
    torch.testing.assert_close(curve[::16], exact[::16], atol=1e-6, rtol=0)


def test_autocorrelation_of_white_noise_is_nothing_and_of_several_is_shared():
    noise = torch.randn(50, 256, generator=torch.Generator().manual_seed(0))
    curve = shattered.autocorrelation(noise)
    assert curve[0] == 1
    assert curve[1:].abs().max() < 0.05  # four standard errors, 1/√(50·128) each
    one, three = (shattered.autocorrelation(noise[:1].repeat(count, 1)) for count in (1, 3))
    torch.testing.assert_close(one, three)


def test_the_gradient_of_a_line_is_that_of_the_images():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10)
    ).double()  # fmt: skip
    start, end = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    gradient = shattered.line_gradient(model, start, end)
    assert gradient.shape == (10, 256)
    # Moving all points by the same step in t changes the sum of a logit by the sum of its gradients.
    model.train()
    t = torch.linspace(0, 1, 256, dtype=torch.float64)[:, None, None, None]
    with torch.no_grad():
        sums = [model(start + (t + step) * (end - start)).sum(0) for step in (1e-6, -1e-6)]
    torch.testing.assert_close(gradient.sum(1).double(), (sums[0] - sums[1]) / 2e-6, atol=1e-2, rtol=1e-2)


def test_gradients_of_deep_plain_networks_are_white_and_of_residual_ones_are_not():
    generator = torch.Generator().manual_seed(0)

    def at_lag_5(kind, depth):
        curves = [shattered.autocorrelation(shattered.network_gradient(kind, depth, generator)) for _ in range(5)]
        return float(torch.stack(curves).mean(0)[5])

    shallow, deep, residual = at_lag_5("plain", 1), at_lag_5("plain", 24), at_lag_5("residual", 50)
    assert shallow > 0.8
    assert abs(deep) < 0.2
    assert deep + 0.3 < residual < shallow


def test_the_study_writes_its_curves(tmp_path, capsys):
    assert main(["study", "shattered", "--model", "cifar_resnet20", "--draws", "1", "--out", str(tmp_path)]) == 0
    with (tmp_path / "shattered.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = list(dict.fromkeys(row["network"] for row in rows))
    assert names == ["plain, 1 layer", "plain, 24 layers", "residual, 50 layers", "cifar_resnet20",
                     "cifar_resnet20 without shortcuts", "white noise", "brown noise"]  # fmt: skip
    assert len(rows) == 7 * 128
    assert all(row["autocorrelation"] == "1.0" for row in rows if row["lag"] == "0")
    assert (tmp_path / "shattered.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "cifar_resnet20: autocorrelation" in capsys.readouterr().out
