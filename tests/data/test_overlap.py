from __future__ import annotations

import pytest

from rlhf_ray.config.data import DatasetConfig
from rlhf_ray.data.datasets import load_pairs, load_supervised
from rlhf_ray.data.overlap import HeldOutPrompts
from rlhf_ray.errors import DataError
from rlhf_ray.models.tokenizers import bpe_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return bpe_tokenizer(["abc"], vocab_size=260, max_length=10_000)


LONG = "which of the rivers of this country is the longest of all"
TRAIN = [
    {"prompt": "Which river?", "completion": "Glomma"},
    {"prompt": "which  RIVER?\n", "completion": "the Glomma"},
    {"prompt": "Which lake?", "completion": "Mjosa"},
    {"prompt": LONG + " now", "completion": "Glomma"},
]


def loaded(write, tokenizer, *, held_out=(), tested=(), **options):
    files = {}
    if held_out:
        files["eval_path"] = write(*held_out, name="val.jsonl")
    tested_on = write(*tested, name="test.jsonl") if tested else None
    data = DatasetConfig(path=write(*TRAIN, name="train.jsonl"), **files, **options)
    reports = []
    train, _ = load_supervised(data, tokenizer, seed=0, on_report=reports.append, tested_on=tested_on)
    return len(train), reports[0]


def test_prompts_that_are_asked_again_are_said(write, tokenizer):
    count, report = loaded(write, tokenizer, held_out=[{"prompt": "Which river?", "completion": "Tana"}])
    assert count == 4
    (place,) = report.overlap
    assert place.endswith("val.jsonl") and place.startswith("also in ") and report.overlap[place] == 2
    assert f"prompts 2 {place} (cleaning.overlap=drop leaves such rows out)" in str(report)


def test_a_prompt_in_another_form_is_the_same(write, tokenizer):
    parts = [{"type": "text", "text": text} for text in ("Which la", "ke?")]
    answer = {"role": "assistant", "content": "?"}
    for test in (
        {"messages": [{"role": "user", "content": parts}, answer]},
        {"chosen": "\n\nHuman: Which lake?\n\nAssistant: a", "rejected": "\n\nHuman: Which lake?\n\nAssistant: b"},
    ):
        assert list(loaded(write, tokenizer, tested=[test])[1].overlap.values()) == [1]


def test_they_can_be_dropped(write, tokenizer):
    test = [{"messages": [{"role": "user", "content": "Which lake?"}, {"role": "assistant", "content": "?"}]}]
    count, report = loaded(write, tokenizer, tested=test, cleaning={"overlap": "drop"})
    assert count == 3 and list(report.dropped.values()) == [1] and "test.jsonl" in next(iter(report.dropped))
    assert report.overlap == {}


def test_nearly_the_same_prompts_are_found_on_request(write, tokenizer):
    asked = [{"prompt": LONG, "completion": "Tana"}]
    assert loaded(write, tokenizer, tested=asked)[1].overlap == {}
    _, report = loaded(write, tokenizer, tested=asked, cleaning={"near_duplicates": 0.8})
    assert [place.split()[0] for place in report.overlap] == ["nearly"]


def test_only_the_rows_that_are_held_out_count(write, tokenizer):
    held_out = [{"prompt": "Which fjord?", "completion": "x"}, {"prompt": "Which lake?", "completion": "x"}]
    assert loaded(write, tokenizer, held_out=held_out, eval_size=1)[1].overlap == {}
    assert sum(loaded(write, tokenizer, held_out=held_out, eval_size=2)[1].overlap.values()) == 1


def test_masked_prompts_are_compared_with_masked_ones(write, tokenizer):
    path = write({"prompt": "mail to a@example.com", "completion": "x"}, {"prompt": "y", "completion": "z"})
    test = write({"prompt": "mail to b@example.com", "completion": "x"}, name="test.jsonl")
    reports = []
    data = DatasetConfig(path=path, cleaning={"privacy": "mask"})
    load_supervised(data, tokenizer, seed=0, on_report=reports.append, tested_on=test)
    assert sum(reports[0].overlap.values()) == 1, "for the model both are the same"


def test_pairs_and_a_broken_test_file(write, tokenizer):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    data = DatasetConfig(path=write(pair), cleaning={"overlap": "drop"})
    with pytest.raises(DataError, match="nothing usable in .*1 also in"):
        load_pairs(data, tokenizer, seed=0, tested_on=write({"bad": 1}, pair, name="test.jsonl"))
    with pytest.raises(DataError, match="gone.jsonl: no such file"):
        load_pairs(data, tokenizer, seed=0, tested_on=data.path.replace("data", "gone"))


def test_a_place_is_the_first_that_asks():
    held_out = HeldOutPrompts()
    held_out.add("test.jsonl", "test.jsonl:3", "Who?")
    held_out.add("other.jsonl", "other.jsonl:1", "who?")
    place = held_out.find("ｗｈｏ?")
    assert (place.source, place.where, place.exactly) == ("test.jsonl", "test.jsonl:3", True)
    assert held_out.find("Whom?") is None
