"""Several sources of supervised rows: columns and templates of their own, duplicates and held-out rows across them."""

from __future__ import annotations

from collections import Counter

import pytest

from rlhf_ray.config.data import DatasetConfig
from rlhf_ray.data.datasets import load_labelled, load_pairs, load_supervised
from rlhf_ray.errors import DataError
from rlhf_ray.models.tokenizers import char_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def tokenizer():
    return char_tokenizer(LETTERS + LETTERS.upper() + " .,:#\n<|>")


def load(data, tokenizer, of=load_supervised, seed=0):
    reports = []
    train, held_out = of(DatasetConfig.model_validate(data), tokenizer, seed=seed, on_report=reports.append)
    return train, held_out, reports


def text(tokenizer, item) -> str:
    return tokenizer.decode(item.token_ids, skip_special_tokens=True)


def test_each_source_has_its_columns_and_its_template(write, tokenizer):
    first = write({"question": "ab", "reply": "c"}, name="first.jsonl")
    second = write({"instruction": "Do", "output": "e"}, name="second.jsonl")
    third = write({"text": "fg"}, {"text": "hi"}, name="third.jsonl")
    sources = [
        {"path": first, "columns": {"prompt": "question", "completion": "reply"}, "template": "chat"},
        {"path": second, "name": "tasks"}, {"path": third, "limit": 1},
    ]  # fmt: skip
    train, _, reports = load({"chat_template": "zephyr", "sources": sources}, tokenizer)
    assert [item.source for item in train] == ["first", "tasks", "third"]
    # One by one they are the same rows.
    alone = []
    for source in sources:
        own = {name: value for name, value in source.items() if name != "name"}
        alone += load({"chat_template": "zephyr", **own}, tokenizer)[0]
    assert [(i.token_ids, i.learned) for i in train] == [(i.token_ids, i.learned) for i in alone]
    assert text(tokenizer, train[0]).startswith("<|user|>") and "### Response" in text(tokenizer, train[1])
    assert [(report.source, report.kept) for report in reports] == [(first, 1), (second, 1), (third, 1)]


def test_a_duplicate_of_another_source_is_one(write, tokenizer):
    first = write({"text": "ab"}, {"text": "cd"}, name="first.jsonl")
    second = write({"text": "cd"}, {"text": "ef"}, name="second.jsonl")
    train, _, reports = load([first, second], tokenizer)
    assert [(item.source, text(tokenizer, item)) for item in train] == [
        ("first", "ab"), ("first", "cd"), ("second", "ef"),
    ]  # fmt: skip
    assert reports[1].dropped == {"duplicate": 1}


def test_no_prompt_is_trained_on_in_one_source_and_held_out_in_another(write, tokenizer):
    rows = [{"prompt": letter, "completion": "x"} for letter in LETTERS[:12]]
    first = write(*rows, name="first.jsonl")
    second = write(*({**row, "completion": "y"} for row in rows[:6]), name="second.jsonl")
    drawn: Counter[str] = Counter()
    for seed in range(8):
        train, held_out, _ = load({"sources": [first, second], "eval_size": 6}, tokenizer, seed=seed)
        asked = [{item.token_ids[0] for item in items} for items in (train, held_out)]
        assert not asked[0] & asked[1] and len(train) + len(held_out) == 18 and 5 <= len(held_out) <= 6
        drawn.update(item.source for item in held_out)
    assert drawn["first"] > drawn["second"] > 0, "in proportion to their rows, on average"


def test_a_source_may_have_held_out_rows_of_its_own(write, tokenizer):
    first = write(*({"text": letter * 2} for letter in "abcdef"), name="first.jsonl")
    second = write(*({"text": letter * 3} for letter in "ab"), name="second.jsonl")
    test = write(*({"text": letter * 3} for letter in "xyz"), name="test.jsonl")
    data = {"eval_size": 2, "sources": [first, {"path": second, "eval_path": test}]}
    train, held_out, _ = load(data, tokenizer)
    assert Counter(item.source for item in train) == {"first": 4, "second": 2}
    assert [item.source for item in held_out] == ["first", "first", "second", "second"], "eval_size of each at most"
    assert [text(tokenizer, item) for item in held_out[2:]] == ["xxx", "yyy"]
    _, one, _ = load({"eval_path": test, "sources": [first, second]}, tokenizer)
    assert [item.source for item in one] == ["", "", ""]


def test_a_source_that_would_be_held_out_whole_is_named(write, tokenizer):
    first = write(*({"text": letter * 2} for letter in LETTERS[:8]), name="first.jsonl")
    second = write({"text": "zz"}, name="second.jsonl")
    seeds = []
    for seed in range(12):
        try:
            load({"eval_size": 4, "sources": [first, second]}, tokenizer, seed=seed)
        except DataError as error:
            assert str(error).startswith(f"{second}: data.eval_size=4 holds out every row of this source")
            assert "data.sources.1.eval_path" in str(error)
            seeds.append(seed)
    assert 0 < len(seeds) < 12


def test_pairs_and_labels_come_from_several_sources_too(write, tokenizer):
    pairs = write({"prompt": "a", "chosen": "b", "rejected": "c"}, name="pairs.jsonl")
    ranked = write({"prompt": "d", "completions": ["e", "f", "g"]}, name="ranked.jsonl")
    train, _, _ = load([pairs, ranked], tokenizer, load_pairs)
    assert [item.source for item in train] == ["pairs", *["ranked"] * 3]
    good = write({"text": "a", "label": 1}, name="good.jsonl")
    stars = write({"review": "b", "stars": 0}, name="stars.jsonl")
    data = [good, {"path": stars, "columns": {"text": "review", "label": "stars"}}]
    labelled, _, _ = load(data, tokenizer, load_labelled)
    assert [(item.source, item.label) for item in labelled] == [("good", 1), ("stars", 0)]
