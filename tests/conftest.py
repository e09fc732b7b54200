"""What holds for every test."""

import pytest

from fusedres import replay


@pytest.fixture(autouse=True)
def nothing_noted():
    """No test goes by the notes of another, which might go past what it puts in the place of a function."""
    replay._notes.clear()
    replay._seen.clear()
