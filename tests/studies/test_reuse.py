"""fusedres.studies.reuse: whose weights are which source's, and what is asked of them."""

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from fusedres.models.densenet import densenet
from fusedres.studies import reuse
from fusedres.studies.reuse import REUSE
from fusedres.studies.study import Row, Setting, Table
from tests.studies.tiny import drawn, table_of, untrained


def dense(fused=False):
    torch.manual_seed(0)
    return densenet(13, growth=4, in_channels=1, fused=fused)


@pytest.mark.parametrize("fused", [False, True])
def test_every_reader_of_a_blocks_features_is_measured_by_source(fused):
    """16 channels and three layers of 4 a block, none compressed: 28 and 40 channels go into the others."""
    found = {name: widths for name, _, widths in reuse.targets_of(dense(fused))}
    assert found == {
        f"block {i}, {reader}": [given, *([4] * count)]
        for i, given in ((1, 16), (2, 28), (3, 40))
        for reader, count in (("layer 2", 1), ("layer 3", 2), ("classifier" if i == 3 else "transition", 3))
    }


def test_weights_are_those_between_source_and_reader():
    model = dense()
    block = model.features.denseblock2
    with torch.no_grad():
        block.denselayer3.conv1.weight.fill_(0.5)
        block.denselayer3.conv1.weight[:, 28:32] = -2.0  # of the first layer
        block.denselayer3.conv1.weight[:, 32:] = 0.0  # of the second
    table = Table({0: list(reuse.weights_by_source(model))})
    assert [point.mean for point in table.of("block 2, layer 3")] == [0.25, 1.0, 0.0]


def test_at_initial_values_all_sources_weigh_the_same_within_what_is_taken_for_chance():
    torch.manual_seed(0)
    tables = [list(reuse.weights_by_source(densenet(22, in_channels=1, fused=False))) for _ in range(20)]
    found = torch.tensor([reuse.ratios(rows) for rows in tables])
    chance = torch.tensor(reuse.CHANCE)
    assert ((found.mean(0) - 1).abs() < chance / 2).all()
    assert (found.std(0) < chance / 2).all()
    assert all(REUSE.found(Table({0: rows})).verdict != "agrees" for rows in tables)


def test_readers_are_drawn():
    (spec,) = REUSE.networks(Setting())
    model = spec.make(classes=10, channels=1, fused=False)
    table = table_of(REUSE, untrained(REUSE, {spec.label: model}))
    assert len(table.series) == 3 * 6 and len(table.of("block 3, classifier")) == 7
    assert all(max(point.mean for point in table.of(series)) == 1 for series in table.series)
    *panels, _ = drawn(REUSE, table)
    assert "transition" in [label.get_text() for label in panels[1].get_xticklabels()]


@pytest.mark.parametrize(
    ("old", "given", "final", "verdict"),
    [(0.8, 0.7, 1.5, "agrees"), (0.8, 1.0, 1.5, "not decided"), (0.8, 1.2, 1.5, "disagrees"),
     (0.8, 0.7, 0.7, "disagrees"), (0.2, 0.7, 1.5, "disagrees")],
)  # fmt: skip
def test_a_verdict_asks_for_spread_for_a_light_input_and_for_heavy_last_features(old, given, final, verdict):
    rows = []
    for i in reuse.BLOCKS:
        for reader in ("layer 4", "layer 6", "transition" if i < 3 else "classifier"):
            weights = [given if i > 1 else 1.0, *([1.0] * 6)]
            if reader == "classifier":
                weights[-2:] = [final] * 2
            elif i == 1:
                weights[:3] = [old] * 3
            rows += [Row(f"block {i}, {reader}", x, weight) for x, weight in enumerate(weights)]
    if old < 0.5:
        rows = [row._replace(value=0.2 * row.value) if row.x < 3 else row for row in rows]
    assert REUSE.found(Table({0: rows})).verdict == verdict
