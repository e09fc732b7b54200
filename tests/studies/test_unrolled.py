"""fusedres.studies.unrolled: what is dropped of a stage, and how far its blocks are from its end."""

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from fusedres.studies import unrolled
from fusedres.studies.dissect import blocks_of, dissected
from fusedres.studies.study import Row, Table
from fusedres.studies.unrolled import UNROLLED
from tests.studies.tiny import done, drawn, images, network, table_of, untrained


def test_blocks_are_dropped_from_either_end_and_put_back(monkeypatch):
    model = dissected(network("cifar_resnet20"))
    seen = []

    def look(model, _):
        seen.append([i for i, block in enumerate(blocks_of(model)) if block.part == "shortcut"])
        return 0.5

    monkeypatch.setattr(unrolled, "error_of", look)
    rows = list(unrolled.drop_more(model, images()))
    assert seen[:6] == [[], [2], [1, 2], [], [1], [1, 2]]
    assert seen[12:] == [[], [8], [7, 8], [], [7], [7, 8]]
    assert rows[4] == Row("stage 1, the first dropped", 1, 0.5)
    assert all(block.part == "whole" for block in blocks_of(model))


def test_residuals_and_distances_are_those_of_the_blocks():
    model = dissected(network("cifar_resnet20")).double()
    pixels = images().pixels.double()
    values = {(row.series, row.x): row.value for row in unrolled.refinement(model, pixels)}
    with torch.no_grad():
        x = model.stem(pixels)
        outputs = [x := block(x) for block in model.layer1]
        residual = model.layer1[1].block.residual(outputs[0])
    assert values["stage 1, residual", 2] == pytest.approx(float(residual.norm() / outputs[0].norm()))
    assert values["stage 1, distance", 2] == pytest.approx(float((outputs[1] - outputs[2]).norm() / outputs[2].norm()))
    assert [values[f"stage {i}, distance", 3] for i in (1, 2, 3)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("last", "first", "late", "verdict"),
    [(0.02, 0.3, 0.1, "agrees"), (0.02, 0.3, 0.9, "not decided"), (0.02, 0.021, 0.1, "not decided"),
     (0.3, 0.02, 0.9, "disagrees")],
)  # fmt: skip
def test_a_verdict_asks_for_cheap_ends_and_shrinking_residuals(last, first, late, verdict):
    rows = []
    for i in unrolled.STAGES:
        for end, cost in (("last", last), ("first", first)):
            rows += [Row(f"stage {i}, the {end} dropped", k, 0.01 + k * cost) for k in range(3)]
        rows += [Row(f"stage {i}, residual", k, value) for k, value in enumerate((1.0, 0.5, late), start=1)]
    table = Table({0: rows})
    assert len(table.of("stage 1, the last dropped")) // 3 == 1
    assert UNROLLED.found(table).verdict == verdict


def test_stages_are_measured_and_drawn():
    table = table_of(UNROLLED, untrained(UNROLLED, {"ResNet-56": network("cifar_resnet20")}))
    assert len(table.series) == 12
    assert len(drawn(UNROLLED, table)) == 3


@pytest.mark.slow
def test_the_last_blocks_of_a_trained_network_cost_no_more_than_the_first(tmp_path):
    _, rows = done(UNROLLED, tmp_path)
    error = {(row["series"], float(row["x"])): float(row["mean"]) for row in rows}
    for i in (1, 2):
        assert error[f"stage {i}, the last dropped", 3] < error[f"stage {i}, the first dropped", 3]
        assert error[f"stage {i}, residual", 9] < error[f"stage {i}, residual", 2]
