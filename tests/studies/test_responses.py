"""fusedres.studies.responses: deviations of what every batch norm puts out."""

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from fusedres.studies import responses
from fusedres.studies.responses import RESPONSES
from fusedres.studies.study import Row, Table
from fusedres.train.network import build
from tests.studies.tiny import drawn, images, network, table_of, untrained


@pytest.mark.parametrize("fused", [False, True])
def test_responses_are_those_after_batch_norm(fused):
    torch.manual_seed(0)
    model = build("cifar_resnet20", classes=10, channels=1, fused=fused).model
    with torch.no_grad():
        model.layer1[0].bn1.weight.fill_(3.0)
    found = responses.responses(model, images())
    assert len(found) == 19
    pixels = images().pixels
    model.eval()
    x = model.bn1(model.conv1(pixels))
    inner = model.layer1[0].bn1(model.layer1[0].conv1(x.relu()))
    assert found[:2] == pytest.approx([float(x.detach().std()), float(inner.detach().std())], rel=1e-4)


def test_layers_are_measured_in_order_and_sorted_and_drawn():
    networks = {label: network("cifar_resnet20") for label in ("plain-20", "plain-56", "ResNet-20", "ResNet-56")}
    table = table_of(RESPONSES, untrained(RESPONSES, networks))
    order, ranked = ([point.mean for point in table.of(f"ResNet-56{suffix}")] for suffix in ("", responses.SORTED))
    assert ranked == sorted(order, reverse=True) != order
    assert len(drawn(RESPONSES, table)) == 2


@pytest.mark.parametrize(
    ("plain", "shallow", "deep", "verdict"),
    [(1.0, 0.8, 0.5, "agrees"), (0.4, 0.5, 0.8, "disagrees"), (1.0, 0.8, 0.79, "not decided"),
     (0.4, 0.8, 0.5, "disagrees")],
)  # fmt: skip
def test_a_verdict_asks_for_all_three_orders_beyond_the_spread(plain, shallow, deep, verdict):
    means = {"plain-20": plain, "plain-56": plain, "ResNet-20": shallow, "ResNet-56": deep}
    rows = [Row(label, x, mean + 0.05 * (-1) ** x) for label, mean in means.items() for x in range(20)]
    assert RESPONSES.found(Table({0: rows})).verdict == verdict
