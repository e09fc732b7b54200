"""fusedres.studies.activations: where batch norm and ReLU stand."""

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from fusedres.models.variants import variant_resnet
from fusedres.studies.activations import ACTIVATIONS, ORDERS
from fusedres.studies.compared import built
from fusedres.studies.run import run
from fusedres.studies.study import Setting
from tests.studies.made_up import drawn, errors, of_the_paper, shown, table


def of(*values, depth=""):
    return {f"{label}{depth}": value for label, value in zip(ORDERS, values, strict=True)}


@pytest.mark.parametrize(
    "verdict, rows",
    [
        ("agrees", of([0.08], [0.12], [0.10], [0.08], [0.05])),
        ("agrees", of([0.08, 0.081], [0.12, 0.121], [0.10, 0.101], [0.08, 0.09], [0.05, 0.051])),
        ("disagrees", of([0.05], [0.12], [0.10], [0.05], [0.08])),
        ("disagrees", of([0.08], [0.05], [0.10], [0.08], [0.05])),
        ("not decided", of([0.0661], [0.0817], [0.0784], [0.0671], [0.0637])),
        ("not decided", of([0.08, 0.12], [0.12, 0.16], [0.10, 0.14], [0.08, 0.12], [0.05, 0.09])),
        ("disagrees", {
            **of([0.08], [0.12], [0.10], [0.08], [0.05], depth=", 110"),
            **of([0.08], [0.12], [0.05], [0.08], [0.05], depth=", 164"),
        }),
    ],
    ids=["order", "two seeds", "full is worse", "BN after is better", "margin", "spread", "at one depth only"],
)  # fmt: skip
def test_every_pair_of_the_paper_counts(verdict, rows):
    assert ACTIVATIONS.found(table(rows)).verdict == verdict


def test_the_picture_has_a_bar_and_a_curve_for_each():
    rows = of([0.08], [0.12], [0.10], [0.08], [0.05])
    bars, curves = drawn(ACTIVATIONS, table(rows, errors(rows)))
    assert [label.get_text() for label in bars.get_yticklabels()] == shown(curves) == list(ORDERS)


def test_the_networks_of_the_paper_are_built():
    assert [spec.label for spec in ACTIVATIONS.networks(Setting())] == list(ORDERS)
    assert list(of_the_paper(ACTIVATIONS)) == [f"{label}, {depth}" for depth in (110, 164) for label in ORDERS]


@pytest.mark.slow
def test_56_layers_do_best_with_full_pre_activation_and_worse_with_anything_after_the_addition(
    tmp_path, plain_where_small
):
    specs = [built(label, variant_resnet, 56, variant) for label, variant in ORDERS.items() if variant != "relu_only"]
    study = ACTIVATIONS._replace(networks=lambda setting: specs)
    assert run(study, tmp_path, Setting(epochs=4), [0], say=print).verdict == "agrees"
