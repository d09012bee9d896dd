"""Instruction tuning on real tasks, with and without an input, in Alpaca's two templates. Small, but whole.

The tasks are external data (`shared_data`), never part of this repository.
"""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.system

SMALL = (
    "steps=30", "eval.every=15", "learner.lr=3e-3", "samples.count=12", "samples.max_new_tokens=8",
    "model.scratch.hidden_size=32", "model.scratch.layers=1", "model.tokenizer.vocab_size=600",
    "plain_text.data.limit=64",
)  # fmt: skip


def test_instructions_with_and_without_an_input(rlhf_ray, shared_data, tmp_path):
    tasks, reviews = shared_data / "alpaca_seed_tasks.jsonl", shared_data / "movie_reviews.train.jsonl"
    files = [f"data.path={tasks}", f"plain_text.data.path={reviews}"]
    run = rlhf_ray("sft", "configs/sft_alpaca.yaml", *files, *SMALL, run_dir=tmp_path / "run")
    before, after = run.summary["before"], run.summary["after"]
    assert after["val/loss"] < before["val/loss"] - 0.5
    instances = {
        (row["instruction"], one["input"]): one["output"]
        for row in map(json.loads, tasks.read_text(encoding="utf-8").splitlines()) for one in row["instances"]
    }  # fmt: skip
    assert "64 rows, 64 examples" in run.output, "plain text"
    prompts = [sample["prompt"] for sample in after["samples"]]
    assert len(prompts) == 12 and all(prompt.endswith("### Response:\n") for prompt in prompts)
    asked = [told_in(prompt) for prompt in prompts]
    assert all(pair in instances for pair in asked), "the data's own words, whole"
    assert {bool(given) for _, given in asked} == {True, False}, "both kinds were held out"


def told_in(prompt: str) -> tuple[str, str]:
    """(instruction, input) out of Alpaca's template; the input is empty where the template has none."""
    told = prompt.split("### Instruction:\n")[1].removesuffix("\n\n### Response:\n")
    instruction, _, given = told.partition("\n\n### Input:\n")
    assert ("paired with an input" in prompt) == bool(given)
    return instruction, given
