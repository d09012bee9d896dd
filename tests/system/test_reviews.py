"""Real text: a small model learns movie reviews and then to write positive ones, with GRPO and PPO, local and on Ray.

The reviews are external data (`shared_data`), never part of this repository.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

# One after the other, and together the longest of all: they begin first (tests/conftest.py).
pytestmark = [pytest.mark.system, pytest.mark.timeout(1400), pytest.mark.xdist_group("reviews, seed 2")]

KEPT_DISTINCT_2 = 0.75


def assert_it_writes_better_reviews(run: Any, rise: float) -> None:
    before, after = run.summary["before"], run.summary["after"]
    assert after["reward"] >= before["reward"] + rise
    assert after["distinct_2"] >= KEPT_DISTINCT_2 * before["distinct_2"]
    assert len(before["samples"]) == len(after["samples"]) == 10
    last = [step["kl_ref"] for step in run.steps[-10:]]
    target = yaml.safe_load((run.run_dir / "config.yaml").read_text())["algorithm"]["kl_target"]
    assert 0 < sum(last) / len(last) <= target


@pytest.fixture(scope="module")
def reviews(shared_data: Path) -> str:
    return f"data.path={shared_data / 'movie_reviews.train.jsonl'}"


@pytest.fixture(scope="module")
def grpo(rlhf_ray, reviews, tmp_path_factory):
    """The GRPO run, local, with its warm start: the other runs begin from the model that it made."""
    return rlhf_ray("rl", "configs/grpo_reviews.yaml", reviews, run_dir=tmp_path_factory.mktemp("grpo") / "run")


@pytest.fixture(scope="module")
def warm(grpo) -> list[str]:
    return [f"model.path={grpo.run_dir / 'start'}", "model.tokenizer.path=null", "warm_start.steps=0"]


@pytest.fixture(scope="module")
def classifier(rlhf_ray, shared_data: Path, tmp_path_factory) -> str:
    """The reward model, made by its own command; the test reviews decide nothing in it."""
    run_dir = tmp_path_factory.mktemp("classifier") / "run"
    paths = [f"{key}={shared_data / f'movie_reviews.{split}.jsonl'}"
             for key, split in (("data.path", "train"), ("eval.test_path", "test"))]  # fmt: skip
    run = rlhf_ray("classifier", "configs/classifier_reviews.yaml", *paths, run_dir=run_dir)
    assert run.summary["after"]["test/accuracy"] >= 0.72
    return f"reward_model.path={run_dir / 'model'}"


def test_grpo_with_a_sentiment_lexicon(grpo):
    assert_it_writes_better_reviews(grpo, rise=0.2)


def test_grpo_on_ray_with_vllm(rlhf_ray, reviews, warm, tmp_path):
    ray = ["executor=ray", "generator.engine=vllm"]
    run = rlhf_ray("rl", "configs/grpo_reviews.yaml", reviews, *warm, *ray, run_dir=tmp_path / "run")
    assert_it_writes_better_reviews(run, rise=0.2)


@pytest.mark.parametrize("executor", ["local", "ray"])
def test_ppo_with_a_reward_model(rlhf_ray, reviews, warm, classifier, tmp_path, executor):
    overrides = [reviews, *warm, classifier, f"executor={executor}"]
    run = rlhf_ray("rl", "configs/ppo_reviews.yaml", *overrides, run_dir=tmp_path / "run")
    assert_it_writes_better_reviews(run, rise=0.1)
