"""fusedres.studies.options: shortcuts A, B and C, and none."""

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from fusedres.studies.options import OF_PAPER, OPTIONS
from fusedres.studies.run import run
from fusedres.studies.study import Setting
from tests.studies.made_up import drawn, errors, of_the_paper, shown, table

A, B, C = OF_PAPER


def of(plain, a, b, c):
    return table({"plain": plain, A: a, B: b, C: c}, errors(["plain", A, B, C]))


@pytest.mark.parametrize(
    "verdict, rows",
    [
        ("agrees", of([0.2854], [0.1503], [0.1452], [0.1419])),
        ("agrees", of([0.30, 0.32], [0.100, 0.101], [0.100, 0.101], [0.11, 0.11])),
        ("disagrees", of([0.10, 0.11], [0.30, 0.31], [0.10, 0.11], [0.10, 0.11])),
        ("disagrees", of([0.40, 0.41], [0.35, 0.36], [0.10, 0.11], [0.10, 0.11])),
        ("not decided", of([0.105], [0.1], [0.1], [0.1])),
        ("not decided", of([0.1, 0.4], [0.1, 0.2], [0.1, 0.2], [0.1, 0.2])),
        ("not decided", of([0.30, 0.30], [0.10, 0.20], [0.10, 0.11], [0.10, 0.11])),
    ],
    ids=["a gain", "a gain on two seeds", "A is worse", "most of it is between options", "margin", "spread", "unlike"],
)
def test_a_gain_and_options_alike_agree(verdict, rows):
    assert OPTIONS.found(rows).verdict == verdict


def test_the_picture_has_a_bar_and_a_curve_for_each():
    bars, curves = drawn(OPTIONS, of([0.3, 0.32], [0.1, 0.11], [0.1, 0.12], [0.1, 0.1]))
    assert [label.get_text() for label in bars.get_yticklabels()] == shown(curves) == ["plain", A, B, C]
    assert [text.get_text() for text in bars.texts] == ["31.0", "10.5", "11.0", "10.0"]


def test_the_networks_of_the_paper_are_built():
    assert list(of_the_paper(OPTIONS)) == ["plain", A, B, C]


@pytest.mark.slow
def test_32_layers_gain_from_shortcuts_of_each_option(tmp_path, plain_where_small):
    assert run(OPTIONS, tmp_path, Setting(epochs=7), [0], say=print).verdict == "agrees"
