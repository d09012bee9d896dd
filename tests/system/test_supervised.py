"""Real dialogues: SFT, then a reward model and DPO from it, then PPO against that reward model. Small, but whole.

The dialogues are external data (`shared_data`), never part of this repository.
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

SMALL = ("data.limit=240", "data.eval_size=60", "data.max_length=128", "eval.every=10", "learner.batch_size=16")
TINY_MODEL = ("model.scratch.hidden_size=64", "model.scratch.intermediate_size=128", "model.tokenizer.vocab_size=800")


def run(command: str, config: str, run_dir: Path, *overrides: str) -> dict[str, Any]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "rlhf_ray.cli", command, config, *overrides, "--run-dir", str(run_dir)]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "Everything is in" in done.stdout
    return json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def files(shared_data: Path) -> list[str]:
    return [f"data.path={shared_data / 'hh_harmless.train.jsonl'}",
            f"data.eval_path={shared_data / 'hh_harmless.test.jsonl'}"]  # fmt: skip


@pytest.fixture(scope="module")
def sft(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run_dir = tmp_path_factory.mktemp("sft") / "run"
    return run_dir, run("sft", "configs/sft_hh.yaml", run_dir, *files, *SMALL, *TINY_MODEL, "steps=30")


@pytest.fixture(scope="module")
def rm(sft, files, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run_dir = tmp_path_factory.mktemp("rm") / "run"
    settings = [*files, *SMALL, "steps=30", "learner.lr=1e-3", f"model.path={sft[0]}/model", "eval.keep_best=false"]
    return run_dir, run("rm", "configs/rm_hh.yaml", run_dir, *settings)


def test_sft_learns_to_answer(sft):
    before, after = sft[1]["before"], sft[1]["after"]
    assert after["val/loss"] < before["val/loss"] - 1.0
    assert len(after["samples"]) == 4 and all(sample["prompt"].endswith("Assistant:") for sample in after["samples"])


def test_the_reward_model_reports_what_a_judge_should_be_known_by(rm):
    after = rm[1]["after"]
    assert after["train/accuracy"] > 0.55, "of what it has seen; 200 pairs teach a small model nothing general"
    for split in ("train", "val"):
        assert 0 <= after[f"{split}/accuracy"] <= 1 and 0 <= after[f"{split}/ece"] <= 1
        assert -1 <= after[f"{split}/length_correlation"] <= 1
        histogram = after[f"{split}/score_histogram"]
        assert sum(histogram["chosen"]) == sum(histogram["rejected"]) > 0


def test_dpo_prefers_what_people_preferred(sft, files, tmp_path):
    settings = [*files, *SMALL, "steps=20", "learner.lr=1e-3", f"model.path={sft[0]}/model", "eval.keep_best=false"]
    summary = run("dpo", "configs/dpo_hh.yaml", tmp_path / "run", *settings)
    assert summary["before"]["train/loss"] == pytest.approx(0.6931, abs=1e-3)
    assert summary["after"]["train/rewards/accuracies"] > 0.6
    assert summary["after"]["train/rewards/margins"] > 0


def test_ppo_against_the_reward_model(sft, rm, shared_data, tmp_path):
    """The chain closes: the policy that SFT made, judged by the model that `rm` made of it."""
    prompts = tmp_path / "prompts.jsonl"
    rows = (shared_data / "hh_harmless.test.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    firsts = [json.loads(row)["chosen"].split("\n\nAssistant:")[0] + "\n\nAssistant:" for row in rows]
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in firsts), encoding="utf-8")
    settings = [
        f"model.path={sft[0]}/model", "model.tokenizer.path=null", "warm_start.steps=0", "data.field=prompt",
        f"data.path={prompts}", "data.prompt_words=null", "data.max_prompt_tokens=100", "data.overlong_prompts=drop",
        "data.eval_size=8", "eval.size=8", f"reward_model.path={rm[0]}/model", "reward_model.output=logit",
        "rollout.prompts_per_step=8", "steps=3",
    ]  # fmt: skip
    summary = run("rl", "configs/ppo_reviews.yaml", tmp_path / "run", *settings)
    assert summary["status"] == "finished" and summary["steps"] == 3
    assert summary["before"]["reward/reward_model"] == pytest.approx(summary["before"]["reward"])
