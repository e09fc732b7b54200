from tests.comparison import each_backend  # noqa: F401
