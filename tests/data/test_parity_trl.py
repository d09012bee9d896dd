"""The tokens and labels of TRL's own SFTTrainer, from its data loader, on the same rows."""

from __future__ import annotations

import itertools
import json
from importlib import resources

import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlhf_ray.config.data import DatasetConfig
from rlhf_ray.data.datasets import load_supervised
from rlhf_ray.data.dialogues import dialogue_messages
from rlhf_ray.data.rows import read_rows
from rlhf_ray.data.templates import CHAT_TEMPLATES
from rlhf_ray.models.tokenizers import bpe_tokenizer

pytestmark = pytest.mark.slow  # importing TRL takes ten seconds


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl", reason="TRL is not installed", exc_type=ImportError)


@pytest.fixture(scope="module")
def dialogues(shared_data):
    """Real conversations of two and more turns, as messages that end with an answer."""
    rows = itertools.islice(read_rows(str(shared_data / "hh_harmless.test.jsonl")), 40)
    return [list(dialogue_messages(row.fields["chosen"])) for row in rows]


@pytest.fixture
def tokenizer(dialogues):
    made = bpe_tokenizer([m["content"] for turns in dialogues for m in turns], vocab_size=400, max_length=4096)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    return made


def of_trl(trl, tokenizer, rows, folder, **options):
    """[(ids, which of them have a label)] in the order of the rows."""
    from datasets import Dataset

    shape = Qwen2Config(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                        num_key_value_heads=1, intermediate_size=8)  # fmt: skip
    settings = trl.SFTConfig(output_dir=str(folder), max_length=None, report_to=[], use_cpu=True, bf16=False,
                             per_device_train_batch_size=1, train_sampling_strategy="sequential",
                             **options)  # fmt: skip
    trainer = trl.SFTTrainer(Qwen2ForCausalLM(shape), settings, train_dataset=Dataset.from_list(rows),
                             processing_class=tokenizer)  # fmt: skip
    batches = [{k: v[0].tolist() for k, v in batch.items()} for batch in trainer.get_train_dataloader()]
    return [(batch["input_ids"], [label != -100 for label in batch["labels"]]) for batch in batches]


def of_ours(tokenizer, rows, folder, **settings):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"cleaning": {"duplicates": False}, "max_length": 10_000, **settings}
    examples, _ = load_supervised(DatasetConfig(path=str(file), **settings), tokenizer, seed=0)
    return [(list(e.token_ids), list(e.learned)) for e in examples]


def assert_equal_up_to_the_last_answer(ours, theirs):
    assert len(ours) == len(theirs) and len(ours) > 1
    for (ids, learned), (trl_ids, trl_learned) in zip(ours, theirs, strict=True):
        end = len(ids)  # what follows is of no use: nothing of it is learned
        assert (trl_ids[:end], trl_learned[:end]) == (ids, learned) and not any(trl_learned[end:])


@pytest.mark.parametrize("template", ["zephyr", "qwen2_5_training"])
def test_assistant_only_loss_on_conversations(trl, dialogues, tokenizer, tmp_path, template):
    files = resources.files("trl") / "chat_templates"
    tokenizer.chat_template = CHAT_TEMPLATES.get(template) or (files / f"{template}.jinja").read_text()
    rows = [{"messages": turns} for turns in dialogues]
    theirs = of_trl(trl, tokenizer, rows, tmp_path, assistant_only_loss=True)
    assert max(len(turns) for turns in dialogues) >= 6, "several answers in one sequence"
    assert_equal_up_to_the_last_answer(of_ours(tokenizer, rows, tmp_path), theirs)


def test_completion_only_loss_on_plain_text(trl, dialogues, tokenizer, tmp_path):
    rows = [{"prompt": f"{turns[0]['content']}\n", "completion": turns[1]["content"]} for turns in dialogues]
    theirs = of_trl(trl, tokenizer, rows, tmp_path)
    assert_equal_up_to_the_last_answer(of_ours(tokenizer, rows, tmp_path), theirs)


def test_whole_texts(trl, dialogues, tokenizer, tmp_path):
    rows = [{"text": turns[0]["content"]} for turns in dialogues]
    theirs = of_trl(trl, tokenizer, rows, tmp_path)
    assert_equal_up_to_the_last_answer(of_ours(tokenizer, rows, tmp_path), theirs)
