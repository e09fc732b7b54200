"""What holds for every test."""

import os
from contextlib import contextmanager

# Nothing is forgiven in tests: the first replay of every note is held against the pass as it is written.
os.environ["FUSEDRES_STRICT"] = "1"

import pytest

from fusedres.nn import size_rule
from fusedres.runtime import replay


@pytest.fixture(autouse=True)
def nothing_noted():
    """No test goes by the notes of another, which might go past what it puts in the place of a function."""
    replay._notes.clear()
    replay._seen.clear()
    replay._unchecked.clear()


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
