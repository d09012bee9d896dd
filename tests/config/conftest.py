from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_ray.config.load import load_config
from rlhf_ray.config.schema import RunConfig


@pytest.fixture
def tree() -> dict[str, Any]:
    """A small valid run as YAML would give it."""
    return {
        "model": {"path": "some/model"},
        "data": {"path": "prompts.jsonl"},
        "rewards": [{"function": "exact_answer"}],
    }


@pytest.fixture
def write(tmp_path) -> Callable[[Any], Path]:
    """Write a tree (or text) as a config file."""

    def write(content: Any) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


@pytest.fixture
def load(tree, write) -> Callable[..., RunConfig]:
    """The small run with overrides."""
    return lambda *overrides: load_config(write(tree), overrides)
