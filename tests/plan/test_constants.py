"""fusedres.plan.constants: files of measured constants, and what predictions make of them."""

import json
from dataclasses import replace

import pytest
import torch

from fusedres import cache
from fusedres.plan import constants, gpus
from fusedres.plan.constants import BOUNDS, Constants, NotConstants
from fusedres.plan.gpus import GPUS, gpu_named
from fusedres.plan.time import BAND, CENTRAL, assumed, constants_of, library_of, library_seconds
from fusedres.runtime import plans

KEPT = Constants(
    "h100", 132, {"rows": 0.6, "gap": 4e-6, "issue": 0.5, "library.rows": 0.5}, "2026-01-01", {"torch": "2"}, 99
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "folder", lambda: tmp_path)
    monkeypatch.setattr(cache, "_said", set())
    gpus.forget_measured()
    yield tmp_path
    gpus.forget_measured()


def keep(what, gpu="h100", multiprocessors=132):
    path = constants.path_for(gpu, multiprocessors)
    path.write_text(what if isinstance(what, str) else json.dumps(what))
    return path


def add(gpu):
    """A pass over 1 GB by a library."""
    return library_seconds("add and ReLU", 5 * 10**8, 5 * 10**8, 0, gpu.peak(torch.bfloat16), gpu)


def test_nothing_changes_without_a_file():
    assert gpu_named("h100") is GPUS["h100"] and not GPUS["h100"].measured
    assert all(assumed(given, GPUS["h100"]) is given for given in BAND)


def test_predictions_go_by_the_file_of_their_gpu():
    keep(KEPT.as_json())
    h100 = gpu_named("h100")
    assert h100 is gpu_named("H100") and h100.measured == KEPT.values
    assert constants_of(h100) == {**constants_of(GPUS["h100"]), **KEPT.values}
    assert add(h100) == pytest.approx(10**9 / (0.5 * 3.35e12) + 4e-6)
    assert gpu_named("h200") is GPUS["h200"] and add(GPUS["h100"]) == pytest.approx(10**9 / (0.82 * 3.35e12) + 1.5e-6)


def test_the_band_moves_with_what_was_measured():
    h100 = replace(GPUS["h100"], measured=KEPT.values)
    fast, central, slow = (assumed(given, h100) for given in BAND)
    assert (central.rows, central.gap, central.issue[-1]) == (0.6, 4e-6, 0.5)
    assert fast.rows > 0.6 > slow.rows and fast.gap < 4e-6 < slow.gap
    assert fast.rows == pytest.approx(BAND[0].rows * 0.6 / CENTRAL.rows)
    assert all(x > y > z for x, y, z in zip(fast.issue, central.issue, slow.issue, strict=True))
    most = replace(GPUS["h100"], measured={name: most for name, (_, most) in BOUNDS.items()})
    shares = [assumed(given, most) for given in BAND]
    assert all(max(one.rows, one.contractions, one.tensor_cores, *one.issue) <= 1 for one in shares)
    assert library_of(most).rows == 1.0


def test_a_plan_that_was_predicted_before_says_nothing_of_a_measured_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "SHIPPED", tmp_path)
    monkeypatch.setattr(plans, "_shipped", {})
    made = plans.Plan.of(GPUS["h100"], measured=False)
    (tmp_path / "h100.json").write_text(json.dumps(made.as_json()))
    assert plans.shipped_for(GPUS["h100"]) is not None
    assert plans.shipped_for(replace(GPUS["h100"], measured=KEPT.values)) is None


def test_written_and_read():
    assert constants.read(keep(KEPT.as_json())) == KEPT


GOOD = KEPT.as_json()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("{", "it is no JSON"),
        ("[]", "expected a JSON object"),
        ({**GOOD, "fusedres constants": 99}, "expected format 1, got 99"),
        ({**GOOD, "gpu": {}}, "KeyError: 'name'"),
        ({**GOOD, "constants": {"colour": 1.0}}, "colour is no constant of the model"),
        ({**GOOD, "constants": {"rows": 7.0}}, "rows: expected 0.3 to 1, got 7"),
        ({**GOOD, "constants": {"rows": "nan"}}, "rows: expected 0.3 to 1, got nan"),
    ],
)
def test_a_file_of_no_use_is_set_aside_and_said_once(what, message, recwarn):
    path = keep(what)
    with pytest.raises(NotConstants, match=message):
        constants.read(path)
    assert gpu_named("h100") is GPUS["h100"]
    said = [str(one.message) for one in recwarn]
    assert len(said) == 1 and message in said[0] and f"set aside as {path.name}.bad" in said[0]
    assert not path.exists() and path.with_name(f"{path.name}.bad").exists()
    gpus.forget_measured()
    assert gpu_named("h100") is GPUS["h100"] and len(recwarn) == 1


def test_a_file_of_another_gpu_is_not_used(recwarn):
    path = keep(replace(KEPT, gpu="h200").as_json())
    assert gpu_named("h100") is GPUS["h100"]
    assert "they are of h200 with 132, and this is h100 with 132 multiprocessors" in str(recwarn[0].message)
    assert path.exists()
