"""fusedres.studies.identity: scaled shortcuts multiply signals and gradients by λ a block."""

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from fusedres.models import variant_resnet
from fusedres.studies import identity
from fusedres.studies.identity import IDENTITY
from fusedres.studies.study import Row, Table
from tests.studies.tiny import drawn, images, table_of, untrained


def scaled(residual_scale):
    torch.manual_seed(0)
    return variant_resnet(
        20, "constant_scaling_shortcut", shortcut_scale=0.7, residual_scale=residual_scale, in_channels=1, fused=False
    )


def test_shortcuts_alone_shrink_signals_and_gradients_as_powers():
    for measured in identity.norms(scaled(0.0), images()):
        assert len(measured) == 4
    signals, gradients = identity.norms(scaled(0.0), images())
    for i in range(4):
        assert signals[i] / signals[0] == pytest.approx(0.7**i, rel=1e-5)
        assert gradients[3 - i] / gradients[3] == pytest.approx(0.7**i, rel=1e-5)


def test_norms_are_of_what_blocks_take_and_give():
    model = scaled(1.0)
    signals, gradients = identity.norms(model, images())
    pixels, labels = images()
    x = model.stem(pixels)
    values = [x, *(x := block(x) for block in model.layer1)]
    x = values[-1]
    for stage in (model.layer2, model.layer3):
        x = stage(x)
    loss = torch.nn.functional.cross_entropy(model.fc(model.avgpool(x).flatten(1)), labels)
    assert signals == pytest.approx([float(value.detach().norm()) for value in values], rel=1e-4)
    expected = [float(one.norm()) for one in torch.autograd.grad(loss, values)]
    assert gradients == pytest.approx(expected, rel=1e-3)


def test_the_study_measures_every_scale_and_draws(monkeypatch):
    monkeypatch.setattr(identity, "DEPTH", 20)
    monkeypatch.setattr(identity, "SCALES", (1.0, 0.5))
    table = table_of(IDENTITY, untrained(IDENTITY, {}))
    assert len(table.series) == 8 and {len(table.of(series)) for series in table.series} == {4}
    assert identity.rate(table, "gradient", 0.5, "shortcuts alone") == pytest.approx(0.5, rel=1e-5)
    assert IDENTITY.found(table).verdict == "agrees"
    assert len(drawn(IDENTITY, table)) == 4


@pytest.mark.parametrize(
    ("factors", "verdict"), [((1.0,), "agrees"), ((1.1,), "disagrees"), ((0.7, 1.6), "not decided")]
)
def test_a_verdict_asks_for_the_formula_beyond_the_spread(factors, verdict):
    rows = {
        seed: [
            Row(f"{what}, λ = {s:g}, {kind}", x, (factor * s) ** x)
            for what in ("signal", "gradient") for s in identity.SCALES for kind in identity.KINDS for x in range(5)
        ]
        for seed, factor in enumerate(factors)
    }  # fmt: skip
    assert IDENTITY.found(Table(rows)).verdict == verdict
