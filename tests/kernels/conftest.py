import pytest

from tests.comparison import seeded

seed = pytest.fixture(autouse=True)(seeded)
