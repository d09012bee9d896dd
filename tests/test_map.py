"""docs/map.md has every file, each with its own first sentence."""

from __future__ import annotations

import pytest

from tests.test_layers import LINES


@pytest.fixture(scope="module")
def make_map(script):
    return script("docs/make_map.py")


def test_the_map_is_true(repo_root, make_map):
    written = (repo_root / "docs" / "map.md").read_text(encoding="utf-8")
    assert written == make_map.page(), "docs/map.md is not what the files say: `make map` writes it again"


def test_every_file_says_what_it_is(make_map):
    silent = [name for name, line in make_map.entries().items() if len(line) < 10]
    assert not silent, f"say in the first sentence what these are: {silent}"


def test_the_map_knows_every_room(make_map):
    names = make_map.entries()
    some = {"rlhf_ray/loops/rl.py", "configs/grpo_arithmetic.yaml", "docs/data.md", "docker/Dockerfile.gpu"}
    assert some <= set(names)
    assert names["rlhf_ray/loops/rl.py"].startswith("The reinforcement-learning loop")


def test_the_rooms_stand_on_the_page_as_the_layers_have_them(make_map):
    lines = [tuple(names.split(", ")) for names in make_map.ROOMS]
    assert lines == list(LINES[1:]), "tests/test_layers.py says who may import whom"
