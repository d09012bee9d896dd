"""PPO-ptx in whole runs: what is learned beside the rollouts, where a stopped run goes on, and bad rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.config.data import DatasetConfig
from rlhf_ray.data.datasets import load_supervised
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.models.loading import load_policy, load_tokenizer
from rlhf_ray.models.torch_engine import TorchEngine
from rlhf_ray.roles.objectives import SFT
from rlhf_ray.roles.supervised import SupervisedTrainer
from rlhf_ray.start.rl import run_rl
from rlhf_ray.start.warm_start import make_tokenizer

PTX = ("algorithm.sft_coef=2", "sft_data.max_length=16", "sft_data.batch_size=4", "eval.size=2")


@pytest.fixture
def rows(tmp_path) -> Path:
    """Answers in letters that the task's own vocabulary lacks."""
    path = tmp_path / "rows.jsonl"
    texts = [("say a", "ab"), ("say b", "bab"), ("say c", "cabba"), ("say d", "d"), ("say e", "ace")]
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in texts))
    return path


def loss_of(model: Path, rows: Path) -> float:
    """Nats a token."""
    tokenizer = load_tokenizer(model)
    examples, _ = load_supervised(DatasetConfig(path=str(rows)), tokenizer, seed=0)
    trainer = SupervisedTrainer(TorchEngine(load_policy(model)), SFT.of(tokenizer), {"train": examples},
                                tokens_per_microbatch=1000, tokenizer=tokenizer)  # fmt: skip
    return trainer.evaluate("train").metrics["loss"]


@pytest.mark.slow
def test_a_policy_learns_the_rows_beside_its_reward(tiny_config, tmp_path, rows, read_rows):
    settings = (f"sft_data.path={rows}", *PTX, "steps=25", "learner.minibatches=2")
    run_rl(tiny_config(*settings), tmp_path / "with")
    metrics = read_rows(tmp_path / "with")
    assert metrics[-1]["loss/sft"] < 0.5 * metrics[0]["loss/sft"]
    # The prompts are not learned; each answer and its end are: 2 + 1, 3 + 1, ... tokens, 19 of five rows.
    learned = [row["sft/tokens"] for row in metrics]
    assert sum(learned[:5]) == 8 * 19, "five steps of two optimiser steps of four rows are eight epochs"
    # The same policy from the same vocabulary, reinforced only.
    alone = tiny_config("steps=25", "learner.minibatches=2", "eval.size=2", f"model.path={tmp_path}/with/start",
                        "model.tokenizer.path=null")  # fmt: skip
    run_rl(alone, tmp_path / "without")
    models = [tmp_path / name for name in ("with/start", "with/model", "without/model")]
    before, after, reinforced_only = (loss_of(model, rows) for model in models)
    assert after < 0.5 * before < reinforced_only
    assert all("loss/sft" not in row for row in read_rows(tmp_path / "without"))


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(tiny_config, tmp_path, rows, read_rows):
    """Where steps end early, so that the number of optimiser steps so far is no function of the step."""
    more = rows.with_name("more.jsonl")
    more.write_text(rows.read_text().replace("say", "said"))
    sources = f"sft_data.sources=[{{path: {rows}, weight: 1}}, {{path: {more}, weight: 3}}]"
    settings = (*PTX, sources, "steps=4", "learner.epochs=3", "learner.stop_kl=0.0001")
    run_rl(tiny_config(*settings), tmp_path / "a")
    assert min(row["optimiser_steps"] for row in read_rows(tmp_path / "a")) < 3
    run_rl(tiny_config(*settings, "checkpoint.every=2"), tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step_4")
    run_rl(tiny_config(*settings), tmp_path / "b", resume=True)
    assert read_rows(tmp_path / "a") == read_rows(tmp_path / "b")
    whole, parts = (load_file(tmp_path / name / "model" / "model.safetensors") for name in "ab")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.slow
def test_a_resumed_run_wants_the_same_rows(tiny_config, tmp_path, rows):
    settings = (f"sft_data.path={rows}", *PTX)
    run_rl(tiny_config(*settings, "steps=1"), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"sft_data\.batch_size has changed"):
        run_rl(tiny_config(*settings, "sft_data.batch_size=3"), tmp_path / "run", resume=True)
    rows.write_text(rows.read_text().replace("cabba", "cabbb"))
    with pytest.raises(DataError, match=r"the data has changed since the run began: sft_data: .*rows\.jsonl"):
        run_rl(tiny_config(*settings), tmp_path / "run", resume=True)


def test_the_vocabulary_of_a_new_tokenizer_is_that_of_these_rows_too(tiny_config, rows):
    tokenizer = make_tokenizer(tiny_config(f"sft_data.path={rows}", *PTX))
    assert tokenizer.unk_token_id not in tokenizer("say cabba 12+3=")["input_ids"]
    assert tokenizer.unk_token_id in make_tokenizer(tiny_config())("say cabba")["input_ids"]


def test_a_bad_row_is_named_before_anything_is_made(tiny_config, tmp_path, rows):
    rows.write_text(rows.read_text() + json.dumps({"prompt": "say it", "completion": "abcde" * 4}) + "\n")
    message = r"sft_data \(where it says data\.\*, sft_data\.\* is meant\): .*rows\.jsonl:6: 27 tokens, the limit is 16"
    with pytest.raises(DataError, match=message):
        run_rl(tiny_config(f"sft_data.path={rows}", *PTX), tmp_path / "run")
    assert not (tmp_path / "run").exists()
