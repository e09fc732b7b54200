"""fusedres.studies.ensemble: whose probabilities are averaged, and what is gained beyond chance."""

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from fusedres.studies import ensemble
from fusedres.studies.ensemble import ENSEMBLE
from fusedres.studies.study import Row, Setting, Table
from tests.studies.tiny import done, drawn, network, table_of, untrained


def test_probabilities_are_averaged_not_logits():
    labels = torch.tensor([0, 0])
    one = torch.tensor([[2.0, 0.0, -50.0], [0.0, 1.0, 0.0]])
    other = torch.tensor([[0.0, 9.0, -50.0], [3.0, 0.0, 0.0]])
    third = torch.tensor([[2.0, 0.0, -50.0], [1.0, 0.9, 0.0]])
    wrong, together = ensemble.members_and_mean([one, other, third], labels)
    assert wrong.tolist() == [[False, True], [True, False], [False, False]]
    # 0.88 + 0 + 0.88 against 0.12 + 1 + 0.12, where the sum of logits is 4 against 9.
    assert together.tolist() == [False, False]


def test_members_and_their_mean_are_measured_and_drawn():
    networks = {f"ResNet-{i}": network("cifar_resnet20", seed=i) for i in range(3)}
    table = table_of(ENSEMBLE, untrained(ENSEMBLE, networks, draws=7))
    assert table.series == [*networks, ensemble.TOGETHER, ensemble.GAIN, ensemble.OVER_BEST]
    assert table.at(ensemble.GAIN, 0).samples == table.at(ensemble.OVER_BEST, 0).samples == 7
    (axes,) = drawn(ENSEMBLE, table)
    assert [label.get_text() for label in axes.get_yticklabels()] == [*networks, ensemble.TOGETHER]


@pytest.mark.parametrize(
    ("gains", "over_best", "verdict"),
    [([0.01, 0.012], [0.0, 0.002], "agrees"), ([-0.01, 0.02], [0.0, 0.002], "not decided"),
     ([0.01, 0.012], [0.0, 0.0], "not decided"),
     ([0.01, 0.012], [-0.01, 0.004], "not decided"), ([0.01, 0.012], [-0.01, -0.008], "disagrees"),
     ([-0.02, -0.021], [-0.03, -0.02], "disagrees")],
)  # fmt: skip
def test_a_verdict_asks_for_a_gain_beyond_the_choice_of_images(gains, over_best, verdict):
    rows = [Row("a", 0, 0.02), Row("b", 0, 0.04), Row(ensemble.TOGETHER, 0, 0.015)]
    rows += [Row(ensemble.GAIN, 0, gain) for gain in gains] + [Row(ensemble.OVER_BEST, 0, gain) for gain in over_best]
    assert ENSEMBLE.found(Table({0: rows})).verdict == verdict


@pytest.mark.slow
def test_trained_networks_together_err_less_than_on_average(tmp_path):
    finding, rows = done(ENSEMBLE, tmp_path)
    errors = {row["series"]: float(row["mean"]) for row in rows}
    members = [errors[spec.label] for spec in ENSEMBLE.networks(Setting())]
    assert errors["ensemble"] < sum(members) / 6
    assert finding.verdict != "disagrees"
