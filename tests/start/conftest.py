"""A run so small that it takes a second."""

from tests.tiny_runs import read_rows, tiny_config  # noqa: F401
