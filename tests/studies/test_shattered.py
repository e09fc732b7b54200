"""fusedres.studies.shattered: the autocorrelation of known signals, gradients, and what the paper finds."""

import math

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from fusedres.studies import shattered
from fusedres.studies.shattered import SHATTERED
from fusedres.studies.study import Row, Table
from tests.studies.tiny import drawn, table_of, untrained


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


def test_gradients_of_unrelated_inputs_correlate_as_the_theorems_say():
    """Theorem 1's 1/2^L exactly; of residual networks it is twenty times that of plain ones at the same depth of 8, and
    at L = 32 still above a plain one's at L = 5."""
    generator = torch.Generator().manual_seed(0)

    def mean(kind, depth):
        return sum(shattered.correlation(kind, depth, generator) for _ in range(10)) / 10

    for depth in (1, 2, 4, 6):
        assert mean("plain", depth) == pytest.approx(0.5**depth, rel=0.2)
    assert mean("residual", 8) > 20 * mean("plain", 8) > 0
    one, many = mean("residual", 1), mean("residual", 32)
    assert one == pytest.approx(0.75, rel=0.05)  # (1 + 1/2)/(1 + 1): a block adds half to the product, 1 to the square
    assert many > 3 * 0.5**5
    assert one / 32**0.75 < many < one / 32**0.45


def test_fits_find_a_rate_and_a_power():
    rows = [Row("correlation, plain", L, 0.4**L) for L in range(1, 9)]
    rows += [Row("correlation, residual", L, 0.7 * L**-0.6) for L in (1, 2, 4, 64)]
    assert shattered.fits(Table({0: rows})) == pytest.approx((0.4, -0.6))


@pytest.mark.parametrize(
    ("rate", "power", "verdict"),
    [(0.5, -0.5, "agrees"), (0.8, -0.1, "not decided"), (0.4, -1.2, "not decided"), (0.9, -2, "disagrees")],
)
def test_a_verdict_asks_for_the_rate_and_a_slower_power(rate, power, verdict):
    rows = [Row("correlation, plain", L, rate**L) for L in range(1, 9)]
    rows += [Row("correlation, residual", L, L**power) for L in (1, 2, 4, 64)]
    rows += [Row(name, 10, 0.0) for name in (*shattered.CONNECTED, *shattered.NOISE)]
    assert SHATTERED.found(Table({0: rows})).verdict == verdict


def test_curves_examples_and_correlations_are_measured_and_drawn(monkeypatch):
    monkeypatch.setattr(shattered, "_between", lambda setting: {"ResNet-20": "cifar_resnet20"})
    table = table_of(SHATTERED, untrained(SHATTERED, {}, draws=1))
    curves = [name for name in table.series if "gradient" not in name and "correlation" not in name]
    assert curves == [*shattered.CONNECTED, "ResNet-20", *shattered.NOISE]
    for name in curves:
        assert table.at(name, 0).mean == 1
        assert len(table.of(name)) == 128
        assert max(abs(point.mean) for point in table.of(f"{name}, gradient")) == pytest.approx(1)
    assert len(drawn(SHATTERED, table)) == 6
    assert "autocorrelation at lag 10" in SHATTERED.found(table).words
