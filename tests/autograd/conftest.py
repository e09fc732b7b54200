import pytest

from tests.comparison import each_backend, seeded  # noqa: F401

seed = pytest.fixture(autouse=True)(seeded)
