"""What a supervised run starts from."""

from __future__ import annotations

import json

import pytest

from rlhf_ray.config.data import DatasetConfig
from rlhf_ray.models.tokenizers import build_tokenizer
from rlhf_ray.start.supervised_inputs import corpus


@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
def test_half_of_a_character_in_a_column_that_nobody_reads_is_no_part_of_the_vocabulary(tmp_path, kind):
    """Of the two halves of an emoji, in JSON \\ud83d and \\ude00, one alone is no text that can be written down."""
    halves = {"note": "d\ud83d", "tags": [{"x": "\ude00e"}]}
    rows = [{"prompt": "ab", "completion": "c", **halves}, {"prompt": "\U0001f600"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = corpus(DatasetConfig(path=str(file)))
    assert texts == ["ab", "c", "d", "e", "\U0001f600"]
    tokenizer = build_tokenizer(kind, texts, vocab_size=None if kind == "char" else 300)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert tokenizer.decode(tokenizer("ab")["input_ids"]) == "ab"
