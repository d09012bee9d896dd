"""A generator and a reward that answer at once, and a run so small that it takes a second."""

from tests.fake_roles import generator, prompts, reward  # noqa: F401
from tests.tiny_runs import read_rows, tiny_config  # noqa: F401
