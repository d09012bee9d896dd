"""A run so small that it takes a second, and its metrics, for the tests of several rooms."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_ray.config.load import load_config
from rlhf_ray.config.schema import RunConfig

TINY: dict[str, Any] = {
    "name": "tiny",
    "steps": 3,
    "device": "cpu",
    "model": {
        "path": "scratch:qwen2",
        "tokenizer": {"path": "scratch:char"},
        "scratch": {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 16},
    },
    "data": {"path": "task:arithmetic", "max_prompt_tokens": 8},
    "rollout": {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 4},
    "rewards": [{"function": "repetition_penalty", "args": {"n": 1}}],
    "learner": {"lr": 1e-2},
    "eval": {"size": 8},
    "logging": {"loggers": []},
}


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory) -> Callable[..., RunConfig]:
    """The tiny run with overrides."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return lambda *overrides: load_config(path, overrides)


@pytest.fixture
def read_rows() -> Callable[[Path], list[dict[str, Any]]]:
    """metrics.jsonl without what a clock says."""

    def read(run_dir: Path) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        clocks = ("time/", "perf/tokens_per_s", "perf/samples_per_s", "perf/peak", "perf/mfu", "sync/gb_per_s", "cost/")
        return [{name: x for name, x in row.items() if not name.startswith(clocks)} for row in rows]

    return read
