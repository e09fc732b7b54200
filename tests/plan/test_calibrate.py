"""fusedres.plan.calibrate: constants that made up times were made with are found again."""

import math
from dataclasses import replace

import pytest

from fusedres.plan import calibrate
from fusedres.plan.calibrate import FEWEST, fit
from fusedres.plan.constants import BOUNDS
from fusedres.plan.time import Work, constants_of, seconds_of
from tests.timed_launches import H100, OTHER, rows, samples

# Of tensor cores a few launches tell alone, and of a load's latency what else a block does.
HARDER = {"tensor_cores", "latency"}


@pytest.mark.parametrize(
    ("attributes", "tolerance", "harder", "median"),
    [
        pytest.param({}, 0.02, 0.08, 0.002, id="exact times"),
        pytest.param({"noise": 0.05}, 0.06, 0.10, 0.04, id="5 % of noise"),
        pytest.param({"noise": 0.05, "wrong": 0.1}, 0.08, 0.12, 0.05, id="and a tenth three times too long"),
    ],
)
def test_constants_are_found_again_and_predictions_agree(attributes, tolerance, harder, median):
    every = samples(**attributes)
    found = fit(every, H100)
    assert found.values.keys() == OTHER.keys()
    for name, value in found.values.items():
        assert value == pytest.approx(OTHER[name], rel=harder if name in HARDER else tolerance), name
    assert found.before["all"].median > 0.2 and found.after["all"].median < median
    # Against what is true, which noise and wrong times hide.
    here, true = replace(H100, measured=found.values), replace(H100, measured=OTHER)
    off = sorted(abs(math.log(seconds_of(one.work, here) / seconds_of(one.work, true))) for one in every)
    assert off[len(off) // 2] < median and off[9 * len(off) // 10] < 3 * median


def test_what_is_right_already_stays_so():
    found = fit(samples({}), H100)
    usual = constants_of(H100)
    assert all(value == pytest.approx(usual[name], rel=1e-3) for name, value in found.values.items())
    assert found.before["all"].most == 0 and found.after["all"].most < 1e-3


def test_what_the_launches_do_not_tell_of_is_left_alone_with_a_reason():
    library = [one for one in samples() if not isinstance(one.work, Work)]
    found = fit(library, H100)
    assert set(found.values) == {name for name in BOUNDS if name.startswith("library.")} | {"gap"}
    assert found.left["issue"] == "0 launches depend on it"
    assert found.values.keys() | found.left.keys() == BOUNDS.keys()


def test_where_the_fit_begins_does_not_depend_on_an_earlier_one():
    every = samples()
    again = fit(every, replace(H100, measured={"rows": 0.35, "gap": 1e-5}))
    assert again.values == fit(every, H100).values


@pytest.mark.slow
def test_constants_stay_plausible():
    found = fit(samples({**OTHER, "library.rows": 0.1}), H100).values
    assert found["library.rows"] == pytest.approx(BOUNDS["library.rows"][0])
    assert found["library.products"] == pytest.approx(OTHER["library.products"], rel=0.02)
    far = fit([one._replace(seconds=10 * one.seconds) for one in samples({})], H100).values
    assert all(BOUNDS[name][0] <= value <= BOUNDS[name][1] for name, value in far.items())


def test_too_few_and_no_times_are_refused():
    every = samples()
    with pytest.raises(ValueError, match=f"launches: expected at least {FEWEST} that were timed, got 19"):
        fit(every[:19], H100)
    for seconds in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="launches: expected times above 0, got"):
            fit([*every[:40], every[40]._replace(seconds=seconds)], H100)


def test_what_a_launch_asks_is_written_and_read():
    for row in rows():
        work = calibrate.read(row.work)
        assert calibrate.written(work) == row.work
        assert seconds_of(work, H100) == pytest.approx(row.predicted_s)
    for text in ("", "{}", "[1]", "null", '{"code": [[1]]}'):
        with pytest.raises(ValueError, match="work: expected what a launch asks of a GPU, got"):
            calibrate.read(text)
