"""The quickstart's other ending, whole: reviews -> SFT -> preferences -> reward model -> PPO, and DPO, and who wins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = [pytest.mark.system, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def pipeline(rlhf_ray, shared_data: Path, tmp_path_factory):
    values = [f"values.{part}={shared_data / f'movie_reviews.{part}.jsonl'}" for part in ("train", "test")]
    values += ["values.prompts=7000", "values.held_out=500", "sft.eval.every=150"]
    values += ["judge.data.eval_size=800", "judge.eval.every=40"]
    folder = tmp_path_factory.mktemp("pipeline") / "run"
    return rlhf_ray("quickstart", "--preferences", *values, run_dir=folder, threads=2)


@pytest.fixture(scope="module")
def run_dir(pipeline) -> Path:
    return pipeline.run_dir


def summary_of(run_dir: Path, stage: str) -> dict:
    return json.loads((run_dir / stage / "summary.json").read_text(encoding="utf-8"))


def test_it_finishes(pipeline):
    assert pipeline.summary["status"] == "finished"


def test_the_classifier_and_the_reward_model_know_their_trade(run_dir):
    assert summary_of(run_dir, "judge")["after"]["test/accuracy"] >= 0.72
    after = summary_of(run_dir, "rm")["after"]
    assert after["val/accuracy"] >= 0.75
    assert {"train/accuracy", "val/ece", "val/length_correlation"} <= after.keys()


@pytest.mark.parametrize("model", ["ppo", "dpo"])
def test_alignment_wins_under_a_judge_that_it_was_not_trained_on(run_dir, model):
    """Against the SFT model, and without forgetting how to write reviews."""
    result = json.loads((run_dir / "eval" / "eval.json").read_text(encoding="utf-8"))
    assert result["win_rate"][model]["rate"] >= 0.65
    assert result["models"][model]["metrics"]["perplexity_rise"] < 0.15
