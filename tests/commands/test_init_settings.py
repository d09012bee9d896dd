"""The YAML that init writes: read back it is what was meant, and every number of it fits the rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.commands.init.look import Look
from rlhf_ray.commands.init.settings import page_of, written
from rlhf_ray.commands.init.wishes import Wishes
from rlhf_ray.config import dialect
from rlhf_ray.config.load import parse_config
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.config.supervised import SCHEMAS

ANSWERS = Look("my rows.jsonl", "prompt_completion", ("prompt", "answer"), 40, False, "answer", 100, 130)
TEXTS = Look("t.csv", "text", ("text",), 2, False, None, 4000, 4000)
CHATS = Look("c.jsonl", "messages", ("messages",), 1000, True, None, 900, 5000)
PAIRS = Look("p.jsonl", "preference", ("chosen", "rejected"), 25, False, None, 0, 260)
HUB = Look("owner/name")


def config_of(data: Look, command: str, model: str = "scratch:qwen2", **more):
    reward = {"reward": "sentiment"} if command == "rl" and "reward_model" not in more else {}
    page = page_of(Wishes(command, data, model, Path("run.yaml"), **reward, **more))
    assert all(len(line) <= 120 for line in page.splitlines()), "it is for reading"
    return parse_config(dialect.read(page), {**SCHEMAS, "rl": RunConfig}[command], source="init")


@pytest.mark.parametrize(
    "text", ["a.jsonl", "my rows.jsonl", "1e5", "no", "a: b", "a #b", "'q'", "[x]", "", " x", "ü/y", "a\nb"]
)
def test_texts_come_back(text):
    assert dialect.read(f"a: {written(text)} # why") == {"a": text}


@pytest.mark.parametrize("model", ["scratch:qwen2", "scratch:gpt2", "scratch:lstm", "owner/name", "./folder"])
@pytest.mark.parametrize(("command", "data"), [
    ("rl", ANSWERS), ("rl", TEXTS), ("rl", CHATS), ("rl", PAIRS), ("rl", HUB), ("sft", ANSWERS), ("sft", TEXTS),
    ("sft", CHATS), ("sft", HUB), ("rm", PAIRS), ("dpo", PAIRS), ("dpo", HUB),
])  # fmt: skip
def test_every_page_is_valid_and_no_setting_speaks_against_another(command, data, model):
    for where in ("local", "ray"):
        config = config_of(data, command, model, where=where)
        assert config.data.path == data.source and config.model.path == model and config.executor == where


def test_prompts_and_answers_of_rl():
    config = config_of(ANSWERS, "rl")
    assert config.warm_start.completion == "answer" and config.warm_start.steps == 200
    # 100 bytes are at most 50 tokens, and Alpaca's template some more: the next multiple of 32
    assert config.data.max_prompt_tokens == 160
    assert config.data.eval_size == config.eval.size == 4, "a tenth"
    assert config.model.scratch.max_length >= 160 + config.rollout.max_new_tokens
    pretrained = config_of(ANSWERS, "rl", "owner/name")
    assert pretrained.warm_start.steps == 0 and pretrained.learner.lr == 1e-6


def test_a_model_folder_with_few_positions(tmp_path):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 192}')
    config = config_of(ANSWERS, "rl", str(tmp_path))
    assert config.rollout.max_new_tokens == 96 and config.data.max_prompt_tokens == 96
    assert config_of(CHATS, "sft", str(tmp_path)).data.max_length == 192
    (tmp_path / "config.json").write_text('{"n_positions": 4096}')
    config = config_of(CHATS, "rl", str(tmp_path))
    assert config.rollout.max_new_tokens == 256 and config.data.max_prompt_tokens == 576, "900 bytes, and a template"


def test_texts_for_rl_are_begun_and_written_on():
    config = config_of(TEXTS, "rl")
    assert (config.data.field, config.data.prompt_words, config.warm_start.completion) == ("text", 4, None)
    assert config.data.eval_size == config.rollout.prompts_per_step == 1, "of two rows, one is held out"


def test_a_model_from_scratch_gets_a_template_for_messages():
    assert config_of(CHATS, "sft").data.chat_template == "zephyr"
    assert config_of(CHATS, "sft", "owner/name").data.chat_template is None, "it brings its own"


def test_small_sets_and_their_batches():
    config = config_of(PAIRS, "dpo")
    assert config.data.eval_size == 2 and config.learner.batch_size == 16 and config.data.max_length == 256
    assert config_of(TEXTS, "sft").learner.batch_size == 1


def test_a_column_by_its_name():
    names = (("prompt", "frage"),)
    assert config_of(ANSWERS, "rl", names=names).data.field == "frage"
    assert config_of(ANSWERS, "sft", names=names).data.columns.prompt == "frage"


def test_a_reward_model():
    config = config_of(ANSWERS, "rl", reward_model="runs/rm/model")
    assert config.reward_model.path == "runs/rm/model" and config.rewards == []
