"""The README's first command, whole: from nothing to a model that adds, three seeds, and the same file on Ray."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.system

AT_MOST_BEFORE, AT_LEAST_AFTER = 0.5, 0.85


def assert_it_learned(summary: dict[str, Any]) -> None:
    assert summary["status"] == "finished"
    assert summary["before"]["accuracy"] <= AT_MOST_BEFORE
    assert summary["after"]["accuracy"] >= AT_LEAST_AFTER


def test_quickstart_learns_to_add(rlhf_ray, tmp_path):
    run = rlhf_ray("quickstart", run_dir=tmp_path / "run", threads=2)
    assert_it_learned(run.summary)
    assert "accuracy" in run.output and "before" in run.output and "after" in run.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.config.model_type == "qwen2"
    assert len(run.steps) == run.summary["steps"]


# A process takes its tests some ahead: the long ones are dealt out here, so that two processes end together.
@pytest.mark.timeout(2000)
@pytest.mark.parametrize("seed", [
    pytest.param(1, marks=pytest.mark.xdist_group("quickstart on Ray, seed 1")),
    pytest.param(2, marks=pytest.mark.xdist_group("reviews, seed 2")),
])  # fmt: skip
def test_two_more_seeds(rlhf_ray, tmp_path, seed):
    assert_it_learned(rlhf_ray("quickstart", f"seed={seed}", run_dir=tmp_path / "run").summary)


@pytest.mark.timeout(2600)
@pytest.mark.xdist_group("quickstart on Ray, seed 1")
def test_the_same_file_on_ray_with_vllm_and_deepspeed(rlhf_ray, tmp_path):
    overrides = ["executor=ray", "generator.engine=vllm", "learner.engine=deepspeed"]
    overrides += ["learner.world_size=2", "learner.zero_stage=2"]
    run = rlhf_ray("rl", "configs/grpo_arithmetic.yaml", *overrides, run_dir=tmp_path / "run")
    assert_it_learned(run.summary)
    assert max(step["sync/canary_absdiff"] for step in run.steps if "sync/canary_absdiff" in step) < 1e-4
    assert max(step["mismatch/absdiff_max"] for step in run.steps) < 1e-4
