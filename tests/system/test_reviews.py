"""Real text: a small model learns movie reviews and then to write positive ones, with GRPO and PPO, local and on Ray.

The reviews are external data (`shared_data`), never part of this repository.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.system

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
KEPT_DISTINCT_2 = 0.75


def run(*arguments: str) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **dict.fromkeys(THREADS, "1")}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def rl(config: str, run_dir: Path, *overrides: str) -> dict[str, Any]:
    run("-m", "rlhf_ray.cli", "rl", config, *overrides, "--run-dir", str(run_dir))
    return json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))


def assert_it_writes_better_reviews(run_dir: Path, summary: dict[str, Any], rise: float) -> None:
    before, after = summary["before"], summary["after"]
    assert after["reward"] >= before["reward"] + rise
    assert after["distinct_2"] >= KEPT_DISTINCT_2 * before["distinct_2"]
    assert len(before["samples"]) == len(after["samples"]) == 10
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = [step["kl_ref"] for step in steps[-10:]]
    assert 0 < sum(last) / len(last) <= kl_target(run_dir)


def kl_target(run_dir: Path) -> float:
    import yaml

    return yaml.safe_load((run_dir / "config.yaml").read_text())["algorithm"]["kl_target"]


@pytest.fixture(scope="module")
def reviews(shared_data: Path) -> str:
    return f"data.path={shared_data / 'movie_reviews.train.jsonl'}"


@pytest.fixture(scope="module")
def grpo(reviews: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The GRPO run, local, with its warm start: the other runs begin from the model that it made."""
    run_dir = tmp_path_factory.mktemp("grpo") / "run"
    return run_dir, rl("configs/grpo_reviews.yaml", run_dir, reviews)


@pytest.fixture(scope="module")
def warm(grpo: tuple[Path, dict[str, Any]]) -> list[str]:
    return [f"model.path={grpo[0] / 'start'}", "model.tokenizer.path=null", "warm_start.steps=0"]


@pytest.fixture(scope="module")
def classifier(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The reward model, made by its own command; the test reviews decide nothing in it."""
    run_dir = tmp_path_factory.mktemp("classifier") / "run"
    paths = [f"{key}={shared_data / f'movie_reviews.{split}.jsonl'}"
             for key, split in (("data.path", "train"), ("eval.test_path", "test"))]  # fmt: skip
    run("-m", "rlhf_ray.cli", "classifier", "configs/classifier_reviews.yaml", *paths, "--run-dir", str(run_dir))
    accuracy = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))["after"]["test/accuracy"]
    assert accuracy >= 0.72
    return f"reward_model.path={run_dir / 'model'}"


def test_grpo_with_a_sentiment_lexicon(grpo):
    assert_it_writes_better_reviews(*grpo, rise=0.2)


def test_grpo_on_ray_with_vllm(reviews, warm, tmp_path):
    ray = ["executor=ray", "generator.engine=vllm"]
    summary = rl("configs/grpo_reviews.yaml", tmp_path / "run", reviews, *warm, *ray)
    assert_it_writes_better_reviews(tmp_path / "run", summary, rise=0.2)


def test_ppo_with_a_reward_model(reviews, warm, classifier, tmp_path):
    summary = rl("configs/ppo_reviews.yaml", tmp_path / "run", reviews, *warm, classifier)
    assert_it_writes_better_reviews(tmp_path / "run", summary, rise=0.1)


def test_ppo_on_ray(reviews, warm, classifier, tmp_path):
    summary = rl("configs/ppo_reviews.yaml", tmp_path / "run", reviews, *warm, classifier, "executor=ray")
    assert_it_writes_better_reviews(tmp_path / "run", summary, rise=0.1)
