"""Fixtures of tests that count what is gone through, and look at what stays alive."""

import gc

import pytest

from fusedres.runtime import switches


@pytest.fixture
def no_check(monkeypatch):
    """What is counted here are the passes without the one that strictness adds; test_replay_strict has that."""
    monkeypatch.setattr(switches, "STRICT", False)


@pytest.fixture
def no_collector():
    """What is kept alive by a cycle stays so, as it may for long."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
