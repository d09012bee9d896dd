"""A reward model that is refreshed between two rounds of PPO: configs/pipeline_online_rm.yaml, whole and very small.

Its stages run in this process: a process each, as tests/system/test_pipeline.py has them, is a minute of imports.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from rlhf_ray import cli
from rlhf_ray.commands.pipeline import stages

# A reward model of four steps is a weak judge, and the run says so.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*weak_judge")]

STAGES = ("sft", "pairs1", "rm1", "ppo1", "pairs2", "rm2", "ppo2", "eval")
RM_STEPS = 4
SMALL = (
    "values.prompts=96", "values.steps=3", "device=cpu",
    "sft.model.scratch={hidden_size: 32, layers: 1, heads: 2, max_length: 64}", "sft.model.tokenizer.vocab_size=1000",
    "sft.data.eval_size=32", "sft.steps=40", "sft.eval.every=20",
    *(f"{rm}.{setting}" for rm in ("rm1", "rm2") for setting in ("data.eval_size=8", f"steps={RM_STEPS}")),
    *(f"{ppo}.{setting}" for ppo in ("ppo1", "ppo2") for setting in (
        "data.limit=64", "data.eval_size=16", "eval.size=16", "rollout.prompts_per_step=16", "learner.lr=3e-3",
        "critic.warmup_steps=0")),
    "eval.data.limit=24", "eval.perplexity.limit=24", "eval.self_bleu_texts=24",
    *(f"{stage}.logging.loggers=[]" for stage in ("sft", "rm1", "ppo1", "rm2", "ppo2")),
)  # fmt: skip


def in_this_process(arguments: list[str]) -> int:
    cli.app(arguments, standalone_mode=False)
    return 0


@pytest.fixture(scope="module")
def run_dir(shared_data: Path, repo_root: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("online")
    for part, rows in (("train", 500), ("test", 24)):
        lines = (shared_data / f"movie_reviews.{part}.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
        (folder / f"{part}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    files = [f"values.{part}={folder / f'{part}.jsonl'}" for part in ("train", "test")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "run_command", in_this_process)
        config = repo_root / "configs" / "pipeline_online_rm.yaml"
        summary = stages.run_pipeline(config, [*files, *SMALL], folder / "run")
    assert summary["status"] == "finished" and tuple(summary["stages"]) == STAGES
    return folder / "run"


def steps_of(stage: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_second_round_goes_on_from_the_first(run_dir):
    """Its pairs are what the new policy writes, its reward model has learned from them, and PPO uses that one."""
    for stage, writer in (("pairs1", "sft"), ("pairs2", "ppo1")):
        made = json.loads((run_dir / stage / "pairs.json").read_text(encoding="utf-8"))
        assert made["model"] == str(run_dir / writer / "model") and made["pairs"] > 8, "more than are held out"
    settings = {stage: yaml.safe_load((run_dir / stage / "config.yaml").read_text()) for stage in ("rm2", "ppo2")}
    assert settings["rm2"]["data"]["path"] == str(run_dir / "pairs2" / "pairs.jsonl")
    assert settings["ppo2"]["reward_model"]["path"] == str(run_dir / "rm2" / "model")
    old, new = (load_file(run_dir / stage / "model" / "model.safetensors") for stage in ("rm1", "rm2"))
    moved = max(float((new[name] - old[name]).abs().max()) for name in old)
    # A step of Adam moves a weight by about the rate; a head that began anew would differ by its random numbers.
    assert 0 < moved < 2 * RM_STEPS * settings["rm2"]["learner"]["lr"]


def test_each_rounds_kl_is_measured_from_the_policy_that_it_began_with(run_dir):
    assert steps_of(run_dir / "ppo1")[-1]["kl_ref"] > 1e-3, "the first round has moved the policy"
    assert abs(steps_of(run_dir / "ppo2")[0]["kl_ref"]) < 1e-5


def test_the_three_policies_are_compared(run_dir):
    result = json.loads((run_dir / "eval" / "eval.json").read_text(encoding="utf-8"))
    assert list(result["models"]) == ["sft", "round1", "round2"] and list(result["win_rate"]) == ["round1", "round2"]
    assert all(model["metrics"]["perplexity"] > 1 for model in result["models"].values())
