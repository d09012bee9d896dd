"""The benchmark of the driver's cost: what it puts in the place of the roles, and what it measures."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

IDLE = Path(__file__).parents[2] / "benchmarks" / "idle" / "sitecustomize.py"


@pytest.fixture
def idle(monkeypatch, tmp_path) -> Any:
    monkeypatch.setenv("DRIVER_OUT", str(tmp_path / "steps.jsonl"))
    spec = importlib.util.spec_from_file_location("idle_roles", IDLE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr("sys.meta_path", [*sys.meta_path])  # what it adds there ends with the test
    spec.loader.exec_module(module)
    return module


def module_with(source: str) -> ModuleType:
    module = ModuleType("some_module")
    exec(source, vars(module))
    return module


def test_makers_of_roles_make_idle_ones_wherever_they_are(idle):
    module = module_with("def make_learner(settings): ...\ndef make_tea(): ...\nfrom json import dumps as make_reward")
    tea, not_its_own = module.make_tea, module.make_reward
    idle.watched(module)
    assert isinstance(module.make_learner("settings"), idle.Idle)
    assert module.make_tea is tea and module.make_reward is not_its_own


def test_a_step_is_measured_from_its_first_request_to_the_end_of_its_log(idle, tmp_path):
    module = module_with(
        "class Rollouts:\n    def next(self, step): return step\n"
        "class TrainingRun:\n    def log(self, *args): self.seen = args\n"
    )
    idle.watched(module)
    run, counted = module.TrainingRun(), []
    for _ in range(2):
        assert module.Rollouts().next(7) == 7
        run.log(1, {"loss": 2.0})
        counted.append(run.seen)
    rows = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert counted == [(1, {"loss": 2.0})] * 2 and len(rows) == 2
    assert all(set(row) == {"python_s", "main_thread_s", "process_s", "wall_s"} for row in rows)


def test_an_idle_generator_answers_every_request_once(idle):
    from rlhf_ray.roles.protocols import Request, Sampling

    generator = idle.Idle()
    generator.submit([Request(0, row, (5, 6), seed=row) for row in range(300)], Sampling(64))
    samples = []
    while generator.open:
        samples += generator.collect()
    assert [sample.sample_id for sample in samples] == list(range(300))
    assert {sample.written for sample in samples} == set(range(8, 64))
