"""The predicted plans in the package are those that would be written now."""

import pytest

from fusedres.explain.shipped_plans import GPUS, MODELS, plan_for, predicted_for, steps
from fusedres.plan.gpus import gpu_named
from fusedres.runtime import plans


@pytest.fixture(params=GPUS)
def shipped(request):
    plan = plans.shipped_for(gpu_named(request.param))
    assert plan is not None
    return plan


def test_they_say_that_they_are_predicted(shipped):
    assert not shipped.measured
    assert shipped.words.startswith("predicted for ")
    assert shipped.decisions.exact


def test_they_are_of_this_version(shipped):
    assert shipped.why_not(gpu_named(shipped.gpu)) is None


@pytest.mark.parametrize(("gpu", "step"), [("h100", (MODELS[1], 256, False)), ("a100", (MODELS[0], 1, True))])
def test_a_step_is_predicted_as_it_was(gpu, step):
    """A change of kernels, tiles or the model of time: run python -m fusedres.explain.shipped_plans."""
    assert step in steps()
    held, now = plans.shipped_for(gpu_named(gpu)).decisions, predicted_for(gpu, *step).decisions
    for what, sizes in now.entries["block"].items():
        for size, choice in sizes.items():
            found = held.entries["block"][what][size]
            assert found["rung"] == choice["rung"]
            assert found["ms"] == pytest.approx(choice["ms"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPUS)
def test_all_is_as_it_would_be_written_now(gpu):
    assert plans.shipped_for(gpu_named(gpu)).decisions.entries == plan_for(gpu).decisions.entries


def test_another_gpu_has_none():
    assert plans.shipped_for(gpu_named("l4")) is None
