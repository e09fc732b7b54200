import pytest

from tests.comparison import seeded
from tests.vgpu.planting import planter

seed = pytest.fixture(autouse=True)(seeded)
plant = pytest.fixture(planter)
