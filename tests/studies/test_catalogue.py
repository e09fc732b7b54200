"""fusedres.studies.catalogue: studies by name, each complete, each with the paper's networks."""

import pytest
import torch

from fusedres.studies.catalogue import STUDIES, check, found, listed
from fusedres.studies.study import Setting


def test_each_study_has_one_line():
    lines = listed().splitlines()
    assert [line.split()[0] for line in lines] == list(STUDIES)
    assert all(len(line.split(maxsplit=1)[1]) > 20 and len(line) <= 120 for line in lines)


def test_an_unknown_study_lists_all():
    with pytest.raises(ValueError, match="study: expected some of these, or all, got 'nonsense'") as raised:
        check("nonsense")
    assert str(raised.value).splitlines()[1:] == listed().splitlines()


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_complete_in_both_settings(name):
    """The networks of the paper's setting are built without memory, for CIFAR's images."""
    study = found(name)
    assert study.name == name
    assert "arXiv:" in study.source and study.paper
    for setting, channels in ((Setting(), 1), (Setting(full=True), 3)):
        recipe, specs = study.recipe(setting), study.networks(setting)
        assert len({spec.label for spec in specs}) == len(specs)
        assert bool(specs) == bool(study.epochs)
        for spec in specs:
            assert spec.change(recipe).batch > 0
            with torch.device("meta"):
                model = spec.make(classes=10, channels=channels, fused=False)
                assert model.eval()(torch.empty(2, channels, 8, 8)).shape == (2, 10)
    assert study.recipe(Setting(epochs=3)).length == study.recipe(Setting(full=True, epochs=3)).length == 3
