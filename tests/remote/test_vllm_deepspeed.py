"""The combination that clusters run: vLLM generates, DeepSpeed ranks learn, all of it on Ray. Here on CPU."""

from __future__ import annotations

import json

import pytest

from rlhf_ray.build import run_rl

STEPS = 3


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_vllm_and_two_zero_ranks(tiny_config, tmp_path, monkeypatch):
    """The run starts its own Ray, learns something, and the generator follows each update to 1e-4."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = tiny_config(
        "executor=ray", f"steps={STEPS}", "generator.engine=vllm", "generator.count=2", "learner.engine=deepspeed",
        "learner.world_size=2", "learner.zero_stage=2", "algorithm.kl_coef=0.01", "ray.start_deadline_s=400",
        # vLLM's CPU attention has no kernel for heads narrower than 32.
        "model.scratch.hidden_size=64", "model.scratch.heads=2",
    )  # fmt: skip
    summary = run_rl(config, tmp_path / "run")
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert summary["status"] == "finished" and len(steps) == STEPS
    for step in steps:
        assert step["sync/canary_absdiff"] < 1e-4
        assert step["mismatch/absdiff_max"] < 1e-4, "what it says it sampled with is what the learner computes"
        assert step["grad_norm"] > 0 and step["approx_kl"] == 0 and step["ratio/max"] == 1
        assert step["staleness/max"] == 0
    assert abs(steps[-1]["kl_ref"]) > 0, "the policy has moved from the reference"
