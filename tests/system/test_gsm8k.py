"""GRPO on GSM8K in a chat template, judged as mathematics: two steps of the real command, with a very small model.

The problems are external data (`shared_data`), never part of this repository.
"""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.system

SMALL = (
    "steps=2", "warm_start.steps=5", "warm_start.batch_size=4", "eval.size=4", "data.limit=200",
    "rollout.prompts_per_step=2", "rollout.group_size=4", "rollout.max_new_tokens=32",
    "model.scratch.hidden_size=32", "model.scratch.layers=1",
)  # fmt: skip


def test_grpo_steps_on_grade_school_problems(rlhf_ray, shared_data, tmp_path):
    folder = tmp_path / "run"
    files = [f"data.path={shared_data / 'gsm8k.train.jsonl'}", f"data.eval_path={shared_data / 'gsm8k.test.jsonl'}"]
    run = rlhf_ray("rl", "configs/grpo_gsm8k.yaml", *files, *SMALL, run_dir=folder)
    assert len(run.steps) == 2 and all(0 <= step["reward/math"] <= 1 for step in run.steps)
    rollouts = [json.loads(line) for file in (folder / "rollouts").iterdir() for line in file.read_text().splitlines()]
    asked = {row["question"] for row in map(json.loads, (shared_data / "gsm8k.train.jsonl").open())}
    for row in rollouts:
        head, tail = "<|user|>\n", "<eos>\n<|assistant|>\n"
        assert row["prompt"].startswith(head) and row["prompt"].endswith(tail)
        assert row["prompt"].removeprefix(head).removesuffix(tail) in asked
    assert "<|assistant|>" in (folder / "model" / "chat_template.jinja").read_text()
