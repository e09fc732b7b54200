"""What holds for every test."""

from contextlib import contextmanager

import pytest

from fusedres import replay


@pytest.fixture(autouse=True)
def nothing_noted():
    """No test goes by the notes of another, which might go past what it puts in the place of a function."""
    replay._notes.clear()
    replay._seen.clear()


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
