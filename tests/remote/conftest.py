"""A run small enough to start in every test: a two-layer model from scratch, the arithmetic task."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Collection, Mapping

import pytest

from rlhf_ray.config.load import apply_override, parse_config
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.remote.calls import Call


@pytest.fixture(scope="module")
def own_ray():
    """One Ray for a test module, with more CPUs in name than the machine has."""
    import ray

    ray.init(address="local", num_cpus=16, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


MakeConfig = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def tiny_config() -> MakeConfig:
    """`tiny_config("executor=ray", "generator.count=2")`: a valid config with these overrides."""

    def make(*overrides: str) -> RunConfig:
        tree = {
            "name": "tiny",
            "steps": 3,
            "device": "cpu",
            "model": {
                "path": "scratch:qwen2",
                "tokenizer": {"path": "scratch:char"},
                "scratch": {"hidden_size": 64, "layers": 2, "heads": 2, "max_length": 32},
            },
            "data": {"path": "task:arithmetic", "max_prompt_tokens": 8, "eval_size": 16},
            "rollout": {"prompts_per_step": 6, "group_size": 4, "max_new_tokens": 8},
            # A point for a first digit: an untrained model must earn something, or nothing is learned.
            "rewards": [{"function": "regex", "args": {"pattern": "[0-9].*"}}],
            "algorithm": {"name": "grpo"},
            "learner": {"lr": 1e-3, "tokens_per_microbatch": 128},
            "generator": {"batch_size": 8},
            "eval": {"size": 16},
            "ray": {"start_deadline_s": 200},
            "logging": {"loggers": []},
        }
        for override in overrides:
            apply_override(tree, override)
        return parse_config(tree, RunConfig, source="the test")

    return make


# (worker, method) -> in which of its calls, while it is under way, whose processes are killed
Strikes = Mapping[tuple[str, str], tuple[int, str]]


@pytest.fixture
def strikes(monkeypatch) -> Callable[..., list[str]]:
    """`strikes({("learner rank 0", "learn"): (3, "generator 0")})`: a list that fills with the calls that it struck;
    `"generator 0 & reward"` names two at once, and those `stopped` are sent SIGSTOP instead."""

    def make(wanted: Strikes, stopped: Collection[tuple[str, str]] = ()) -> list[str]:
        struck, seen, workers, start = [], Counter(), {}, Call.start

        def strike(call: Call) -> None:
            start(call)
            key = call.worker.name, call.name
            seen[key] += 1
            workers.setdefault(call.worker.name, call.worker)
            nth, victim = wanted.get(key, (0, ""))
            if seen[key] == nth:
                struck.append(" ".join(key))
                for name in victim.split(" & "):
                    os.kill(workers[name].pid, signal.SIGSTOP if key in stopped else signal.SIGKILL)

        monkeypatch.setattr(Call, "start", strike)
        return struck

    return make
