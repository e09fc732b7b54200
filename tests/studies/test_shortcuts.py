"""fusedres.studies.shortcuts: what a shortcut does to its input."""

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from fusedres.models.variants import variant_resnet
from fusedres.studies.compared import built
from fusedres.studies.run import run
from fusedres.studies.shortcuts import SHORTCUTS
from fusedres.studies.study import Setting
from tests.studies.made_up import drawn, errors, of_the_paper, shown, table


def of(original, gated, dropped):
    names = ("original", "gated", "dropped")
    return table(dict(zip(names, (original, gated, dropped), strict=True)), errors(names))


@pytest.mark.parametrize(
    "verdict, rows",
    [
        ("agrees", of([0.066], [0.087], [0.9])),
        ("disagrees", of([0.12, 0.13], [0.08, 0.09], [0.9, 0.9])),
        ("not decided", of([0.0661], [0.0691], [0.9])),
        ("not decided", of([0.06, 0.09], [0.08, 0.11], [0.9, 0.9])),
    ],
    ids=["the identity is best", "another is better", "within the margin", "within the spread"],
)
def test_the_best_of_the_others_decides(verdict, rows):
    assert SHORTCUTS.found(rows).verdict == verdict


def test_those_that_fail_are_counted():
    words = SHORTCUTS.found(of([0.05, 0.05], [0.15, 0.15], [0.9, 0.9])).words
    assert words.endswith("2 of 2 clearly worse than the original, 1 above 20%")


def test_the_picture_has_a_bar_and_a_curve_for_each():
    bars, curves = drawn(SHORTCUTS, of([0.3, 0.32], [0.1, 0.11], [0.9, 0.9]))
    assert [label.get_text() for label in bars.get_yticklabels()] == shown(curves) == ["original", "gated", "dropped"]


def test_the_networks_of_the_paper_are_built():
    small = [spec.label for spec in SHORTCUTS.networks(Setting())]
    full = list(of_the_paper(SHORTCUTS))
    assert set(small) < set(full) and len(full) == 12


def test_the_scales_are_those_of_the_labels():
    scales = {
        spec.label: {(block.shortcut_scale, block.residual_scale) for block in made.layer1}
        for spec in SHORTCUTS.networks(Setting())
        if spec.label.startswith("scaling")
        for made in [spec.make(classes=10, channels=1, fused=False)]
    }
    assert scales == {
        "scaling, 0 and 1": {(0.0, 1.0)}, "scaling, 0.5 and 1": {(0.5, 1.0)}, "scaling, 0.5 and 0.5": {(0.5, 0.5)},
    }  # fmt: skip


@pytest.mark.slow
def test_twenty_layers_learn_with_the_identity_and_not_with_dropout(tmp_path, plain_where_small):
    variants = {"original": "original", "dropout": "dropout_shortcut"}
    specs = [built(label, variant_resnet, 20, variant) for label, variant in variants.items()]
    study = SHORTCUTS._replace(networks=lambda setting: specs)
    said = []
    assert run(study, tmp_path, Setting(epochs=6), [0], say=said.append).verdict == "agrees"
    assert "1 of 1 clearly worse than the original" in said[1]
