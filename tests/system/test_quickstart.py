"""The README's first command, whole: from nothing to a model that adds, three seeds, and the same file on Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.system

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
AT_MOST_BEFORE, AT_LEAST_AFTER, SECONDS = 0.5, 0.85, 300


def start(*arguments: str, threads: int) -> subprocess.Popen[str]:
    """The command as a user runs it, with no network to fall back on."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **dict.fromkeys(THREADS, str(threads))}
    command = [sys.executable, "-m", "rlhf_ray.cli", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str], run_dir: Path) -> tuple[dict[str, Any], str]:
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output[-4000:]
    return json.loads((run_dir / "summary.json").read_text(encoding="utf-8")), output


def assert_it_learned(summary: dict[str, Any]) -> None:
    assert summary["status"] == "finished"
    assert summary["before"]["accuracy"] <= AT_MOST_BEFORE
    assert summary["after"]["accuracy"] >= AT_LEAST_AFTER


@pytest.mark.alone
def test_quickstart_learns_to_add_in_under_five_minutes(tmp_path):
    run_dir = tmp_path / "run"
    summary, output = finish(start("quickstart", "--run-dir", str(run_dir), threads=2), run_dir)
    assert_it_learned(summary)
    assert summary["seconds"] < SECONDS
    assert "accuracy" in output and "before" in output and "after" in output
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    assert model.config.model_type == "qwen2"
    assert (run_dir / "metrics.jsonl").read_text().count("\n") == summary["steps"]


@pytest.mark.parametrize("seed", [
    pytest.param(1, marks=pytest.mark.xdist_group("seed 1")), pytest.param(2, marks=pytest.mark.xdist_group("seed 2"))
])  # fmt: skip
def test_two_more_seeds(tmp_path, seed):
    run_dir = tmp_path / "run"
    assert_it_learned(finish(start("quickstart", f"seed={seed}", "--run-dir", str(run_dir), threads=1), run_dir)[0])


@pytest.mark.timeout(1300)
@pytest.mark.xdist_group("quickstart on Ray")
def test_the_same_file_on_ray_with_vllm_and_deepspeed(tmp_path):
    run_dir = tmp_path / "run"
    overrides = ["executor=ray", "generator.engine=vllm", "learner.engine=deepspeed"]
    overrides += ["learner.world_size=2", "learner.zero_stage=2"]
    process = start("rl", "configs/grpo_arithmetic.yaml", *overrides, "--run-dir", str(run_dir), threads=1)
    summary, _ = finish(process, run_dir)
    assert_it_learned(summary)
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert max(step["sync/canary_absdiff"] for step in steps if "sync/canary_absdiff" in step) < 1e-4
    assert max(step["mismatch/absdiff_max"] for step in steps) < 1e-4
