"""What holds for every test."""

import os
from contextlib import contextmanager
from pathlib import Path

# Nothing is forgiven in tests: the first replay of every note is held against the pass as it is written.
os.environ["FUSEDRES_STRICT"] = "1"

import pytest

from fusedres.nn import size_rule
from fusedres.plan import constants
from fusedres.runtime import plans, replay


@pytest.fixture(autouse=True)
def nothing_noted():
    """No test goes by the notes of another, which might go past what it puts in the place of a function."""
    replay._notes.clear()
    replay._seen.clear()
    replay._unchecked.clear()


@pytest.fixture(autouse=True, scope="session")
def no_plans_of_this_machine(tmp_path_factory):
    """What was measured here says nothing about what a test expects, and no test leaves a plan behind."""
    folder = tmp_path_factory.mktemp("plans")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "folder", lambda: folder)
        patch.setattr(constants, "folder", lambda: folder)
        yield


@pytest.fixture(autouse=True, scope="session")
def kernels_of_tests_are_found():
    """Processes that compile import kernels by their module's name, from where this one looks for modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1])
        yield


LEAST_WORK = size_rule.LEAST_WORK_PER_THREAD


@pytest.fixture(autouse=True)
def fused_at_any_size(monkeypatch):
    """Tests of fused passes use tensors for which a CPU runs the plain modules by default."""
    monkeypatch.setattr(size_rule, "LEAST_WORK_PER_THREAD", 0)


@pytest.fixture
def plain_where_small(fused_at_any_size, monkeypatch):
    """As everywhere but in tests, and so in the processes that they start."""
    monkeypatch.setattr(size_rule, "LEAST_WORK_PER_THREAD", LEAST_WORK)


@pytest.fixture
def current_devices(monkeypatch):
    """The names of the devices of `fusedres.bench` that are the current ones, as a list that changes with them."""
    from fusedres.bench.setting import Device

    names = []

    @contextmanager
    def made_current(device):
        names.append(device.name)
        yield
        names.pop()

    monkeypatch.setattr(Device, "made_current", made_current)
    return names
