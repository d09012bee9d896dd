"""Real dialogues: SFT, then a reward model and DPO from it, then PPO against that reward model. Small, but whole.

The dialogues are external data (`shared_data`), never part of this repository.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

SMALL = ("data.limit=240", "data.eval_size=60", "data.max_length=128", "eval.every=10", "learner.batch_size=16")
TINY_MODEL = ("model.scratch.hidden_size=64", "model.scratch.intermediate_size=128", "model.tokenizer.vocab_size=800")


@pytest.fixture(scope="module")
def files(shared_data: Path) -> list[str]:
    return [f"data.path={shared_data / 'hh_harmless.train.jsonl'}",
            f"data.eval_path={shared_data / 'hh_harmless.test.jsonl'}"]  # fmt: skip


@pytest.fixture(scope="module")
def sft(rlhf_ray, files: list[str], tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("sft") / "run"
    return rlhf_ray("sft", "configs/sft_hh.yaml", *files, *SMALL, *TINY_MODEL, "steps=30", run_dir=run_dir)


@pytest.fixture(scope="module")
def rm(rlhf_ray, sft, files: list[str], tmp_path_factory):
    settings = [*files, *SMALL, "steps=30", "learner.lr=1e-3", f"model.path={sft.run_dir}/model"]
    run_dir = tmp_path_factory.mktemp("rm") / "run"
    return rlhf_ray("rm", "configs/rm_hh.yaml", *settings, "eval.keep_best=false", run_dir=run_dir)


def test_sft_learns_to_answer(sft):
    before, after = sft.summary["before"], sft.summary["after"]
    assert after["val/loss"] < before["val/loss"] - 1.0
    assert "Everything is in" in sft.output
    assert len(after["samples"]) == 4 and all(sample["prompt"].endswith("Assistant:") for sample in after["samples"])


def test_the_reward_model_reports_what_a_judge_should_be_known_by(rm):
    after = rm.summary["after"]
    assert after["train/accuracy"] > 0.55, "of what it has seen; 200 pairs teach a small model nothing general"
    for split in ("train", "val"):
        assert 0 <= after[f"{split}/accuracy"] <= 1 and 0 <= after[f"{split}/ece"] <= 1
        assert -1 <= after[f"{split}/length_correlation"] <= 1
        histogram = after[f"{split}/score_histogram"]
        assert sum(histogram["chosen"]) == sum(histogram["rejected"]) > 0


def test_dpo_prefers_what_people_preferred(rlhf_ray, sft, files, tmp_path):
    settings = [*files, *SMALL, "steps=20", "learner.lr=1e-3", f"model.path={sft.run_dir}/model"]
    run = rlhf_ray("dpo", "configs/dpo_hh.yaml", *settings, "eval.keep_best=false", run_dir=tmp_path / "run")
    summary = run.summary
    assert summary["before"]["train/loss"] == pytest.approx(0.6931, abs=1e-3)
    assert summary["after"]["train/rewards/accuracies"] > 0.6
    assert summary["after"]["train/rewards/margins"] > 0


def test_ppo_against_the_reward_model(rlhf_ray, sft, rm, shared_data, tmp_path):
    """The chain closes: the policy that SFT made, judged by the model that `rm` made of it."""
    prompts = tmp_path / "prompts.jsonl"
    rows = (shared_data / "hh_harmless.test.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    firsts = [json.loads(row)["chosen"].split("\n\nAssistant:")[0] + "\n\nAssistant:" for row in rows]
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in firsts), encoding="utf-8")
    settings = [
        f"model.path={sft.run_dir}/model", "model.tokenizer.path=null", "warm_start.steps=0", "data.field=prompt",
        f"data.path={prompts}", "data.prompt_words=null", "data.max_prompt_tokens=100", "data.overlong_prompts=drop",
        "data.eval_size=8", "eval.size=8", f"reward_model.path={rm.run_dir}/model", "reward_model.output=logit",
        "rollout.prompts_per_step=8", "steps=3",
    ]  # fmt: skip
    summary = rlhf_ray("rl", "configs/ppo_reviews.yaml", *settings, run_dir=tmp_path / "run").summary
    assert summary["status"] == "finished" and summary["steps"] == 3
    assert summary["before"]["reward/reward_model"] == pytest.approx(summary["before"]["reward"])
