"""A generator and a reward that answer at once."""

from tests.fake_roles import generator, prompts, reward  # noqa: F401
