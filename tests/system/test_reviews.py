"""Real text: a small model learns movie reviews and then to write positive ones, with GRPO and PPO, local and on Ray.

The reviews are external data (`shared_data`), never part of this repository.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

# One after the other, and together the longest of all: they begin first (tests/conftest.py).
pytestmark = [pytest.mark.system, pytest.mark.timeout(2800), pytest.mark.xdist_group("reviews, seed 2")]

KEPT_DISTINCT_2 = 0.75
# As many threads (one), the same kernels, and a warm-up that does not depend on the run's length.
SAME = ("device=cpu", "generator.engine=hf", "learner.lr_warmup_steps=2", "critic.lr_warmup_steps=2")


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
    larger = ("data.eval_size=800", "eval.every=40")
    run = rlhf_ray("classifier", "configs/classifier_reviews.yaml", *paths, *larger, run_dir=run_dir)
    assert run.summary["after"]["test/accuracy"] >= 0.72
    return f"reward_model.path={run_dir / 'model'}"


def test_grpo_with_a_sentiment_lexicon(grpo):
    assert_it_writes_better_reviews(grpo, rise=0.2)


def test_grpo_on_ray_with_vllm(rlhf_ray, reviews, warm, tmp_path):
    ray = ["executor=ray", "generator.engine=vllm"]
    run = rlhf_ray("rl", "configs/grpo_reviews.yaml", reviews, *warm, *ray, run_dir=tmp_path / "run")
    assert_it_writes_better_reviews(run, rise=0.2)


@pytest.fixture(scope="module")
def ppo(rlhf_ray, reviews, warm, classifier, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("ppo") / "run"
    return rlhf_ray("rl", "configs/ppo_reviews.yaml", reviews, *warm, classifier, *SAME, run_dir=run_dir)


def test_ppo_with_a_reward_model(ppo):
    assert_it_writes_better_reviews(ppo, rise=0.1)


def test_ppo_on_ray_is_the_same_run(rlhf_ray, reviews, warm, classifier, ppo, tmp_path):
    """Every digit of every step, critic warm-up and 19 steps of the policy long: so it comes to the same end."""
    overrides = [reviews, *warm, classifier, *SAME, "executor=ray", "steps=24"]
    run = rlhf_ray("rl", "configs/ppo_reviews.yaml", *overrides, run_dir=tmp_path / "run")
    assert len(run.steps) == 24 and run.summary["before"] == ppo.summary["before"]
    for here, there in zip(run.steps, ppo.steps, strict=False):
        assert without_clocks(here) == without_clocks(there)


def without_clocks(step: dict[str, float]) -> dict[str, float]:
    clocks = ("time/", "perf/", "cost/", "sync/gb_per_s")
    return {name: value for name, value in step.items() if not name.startswith(clocks)}
