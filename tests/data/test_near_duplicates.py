from __future__ import annotations

import json
import random

import pytest

from rlhf_ray.config.data import DatasetConfig
from rlhf_ray.data.datasets import load_labelled, load_pairs, load_supervised
from rlhf_ray.data.near_duplicates import NearDuplicates, similarity
from rlhf_ray.data.parts import parts_of
from rlhf_ray.data.rows import Row
from rlhf_ray.data.types import detect, parse
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.tokenizers import bpe_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return bpe_tokenizer(["abc"], vocab_size=260, max_length=10_000)


# ---- how alike: word triples that both have, over those that either has ------------------------------------


@pytest.mark.parametrize(
    ("text", "other", "alike"),
    [
        ("one two three four", "one two three four", 1.0),
        ("One, two: THREE four!", "one two three four", 1.0),  # case and punctuation are no difference
        ("one two three four", "one two three five", 1 / 3),  # 123 | 234, 235
        ("one two three four five", "one two three four", 2 / 3),  # 123 234 | 345
        ("one two three", "three two one", 0.0),
        ("one two", "one two", 1.0),  # fewer than three words: one piece
        ("one two", "one three", 0.0),
        ("a + b = c", "a - b = c", 1 / 5),  # a+b +b= b=c and a-b -b= b=c
        ("???", "!!!", 0.0),  # nothing but punctuation: the text itself
    ],
)  # fmt: skip
def test_similarity(text, other, alike):
    assert similarity(text, other) == pytest.approx(alike)


def test_chinese_counts_as_its_english_twin():
    # Six words, the last one another: 4 triples each, 3 of them shared, 5 in all.
    for text, other in (("湖水今天很清", "湖水今天很浊"), ("a b c d e f", "a b c d e g")):
        assert similarity(text, other) == pytest.approx(3 / 5)
    assert similarity("ﾀﾜｰ高い塔だ", "タワー高い塔だ") == 1.0, "width is no difference"


# ---- the index ---------------------------------------------------------------------------------------------


def sentence(rng, length=30):
    return [f"w{rng.randrange(500)}" for _ in range(length)]


def test_near_ones_are_found_and_others_are_not():
    rng = random.Random(0)
    texts = [sentence(rng) for _ in range(300)]
    near = [[*words[:-2], "x", "y"] for words in texts]  # 26 of 30 triples: 0.867
    far = [[*words[:20], *sentence(rng, 10)] for words in texts]  # 18 of 38: 0.474
    index = NearDuplicates(0.8)
    assert all(index.find_or_add(number, [" ".join(words)]) is None for number, words in enumerate(texts))
    assert [index.find([" ".join(words)]) for words in near] == list(range(300))
    assert [index.find([" ".join(words)]) for words in far] == [None] * 300


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.9, 1.0])
def test_the_threshold_itself_counts_as_near(threshold):
    index = NearDuplicates(threshold)
    base = [f"w{i}" for i in range(21)]  # 19 triples
    index.add("base", [" ".join(base)])
    assert index.find([" ".join(base)]) == "base"
    fewer = next(n for n in range(1, 22) if (21 - n - 2) / 19 < threshold)  # n words from the end away
    assert index.find([" ".join(base[:-fewer])]) is None


def test_every_part_must_be_near():
    index = NearDuplicates(0.8)
    prompt = " ".join(f"p{i}" for i in range(200))
    index.add("first", [prompt, "the answer is blue today"])
    assert index.find([prompt, "the answer is blue today"]) == "first"
    assert index.find([prompt, "quite another one than that"]) is None, "many answers to a long prompt"
    assert index.find(["the answer is blue today", prompt]) is None
    assert index.find([prompt]) is None, "another number of parts"


def test_the_first_that_was_added_is_named():
    index = NearDuplicates(0.5)
    for key, text in (("a", "one two three four five six"), ("b", "one two three four five seven")):
        index.add(key, [text])
    assert index.find(["one two three four five"]) == "a"


@pytest.mark.parametrize("threshold", [0.0, 0.2, 1.01, float("nan")])
def test_a_threshold_that_means_nothing_is_refused(threshold):
    with pytest.raises(ConfigError, match=r"it must be 0\.3 to 1"):
        NearDuplicates(threshold)


# ---- what is compared of a row -----------------------------------------------------------------------------

RIVERS = "the longest river of this country is the one that everybody here calls the Glomma"
CALL = [{"id": "c1", "type": "function", "function": {"name": "tide", "arguments": {"at": "Bergen"}}}]


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"prompt": "p", "completion": "c"}, ("p", "c")),
        ({"prompt": "p", "completion": "c", "label": True}, ("p", "c", "label 1")),
        ({"text": "t", "label": 0}, ("t", "label 0")),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, ("p", "c", "r")),
        ({"prompt": "p", "completions": ["c", "r"]}, ("p", "c", "r")),
        ({"instruction": "i", "input": "x", "output": "o"}, ("i\nx", "o")),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, ("q", "a")),
    ],
)
def test_the_parts_of_a_row(row, parts):
    row = Row(row, "here:1")
    (record,) = parse(row, detect(row))
    assert parts_of(record) == parts


def test_two_conversations_with_other_calls_are_two():
    def record(harbour):
        calls = json.loads(json.dumps(CALL).replace("Bergen", harbour))
        turns = [{"role": "user", "content": "Tide?"}, {"role": "assistant", "content": "", "tool_calls": calls}]
        row = Row({"messages": turns}, "here:1")
        return parse(row, detect(row))[0]

    assert parts_of(record("Bergen"))[1].split() == ["tide", "Bergen"]
    assert parts_of(record("Bergen")) != parts_of(record("Narvik"))


def test_two_rows_with_other_tools_or_variables_are_two():
    turns = [{"role": "user", "content": RIVERS}, {"role": "assistant", "content": "The Glomma."}]
    others = [{}, {"tools": [{"name": "tide"}]}, {"tools": [{"name": "river"}]}, {"chat_template_kwargs": {"on": 1}}]
    for row in ({"messages": turns}, {"prompt": turns[:1], "completion": turns[1:]}, {"prompt": turns[:1]}):
        near = NearDuplicates[int](0.3)
        rows = [Row({**row, **other}, "here:1") for other in others]
        parts = [parts_of(parse(found, detect(found))[0]) for found in rows]
        assert [near.find_or_add(i, own) for i, own in enumerate(parts)] == [None] * 4
        assert [near.find_or_add(i, own) for i, own in enumerate(parts)] == [0, 1, 2, 3]


# ---- in a run ----------------------------------------------------------------------------------------------

def test_near_duplicates_are_left_out_and_counted_on_request(write, tokenizer):
    rows = [{"text": RIVERS}, {"text": RIVERS + "!"}, {"text": RIVERS + " today"}, {"text": "the sea"}]
    reports = []
    train, _ = load_supervised(
        DatasetConfig(path=write(*rows), cleaning={"near_duplicates": 0.8}), tokenizer, seed=0, on_report=reports.append
    )
    assert len(train) == 2 and reports[0].dropped == {"near duplicate": 2}
    assert len(load_supervised(DatasetConfig(path=write(*rows)), tokenizer, seed=0)[0]) == 4, "off by default"


def test_chinese_near_duplicates_are_left_out(write, tokenizer):
    rows = [
        {"prompt": "请介绍一下这个国家最长的河流。", "completion": "格罗马河是这个国家最长的河流，全长六百公里。"},
        {"prompt": "请介绍一下这个国家最长的河流", "completion": "格罗马河是这个国家最长的河流，全长六百公里！"},
        {"prompt": "请介绍一下这个国家最长的河流。", "completion": "我不知道。"},
    ]
    data = DatasetConfig(path=write(*rows), cleaning={"near_duplicates": 0.8})
    assert len(load_supervised(data, tokenizer, seed=0)[0]) == 2


def test_the_same_text_with_another_label_stays(write, tokenizer):
    rows = write({"text": RIVERS, "label": 1}, {"text": RIVERS + ".", "label": 0}, {"text": RIVERS + "!", "label": 1})
    data = DatasetConfig(path=rows, cleaning={"near_duplicates": 0.8})
    assert [text.label for text in load_labelled(data, tokenizer, seed=0)[0]] == [1, 0]


def test_pairs_that_differ_in_one_answer_stay(write, tokenizer):
    pair = {"prompt": RIVERS, "chosen": "yes it is " + RIVERS, "rejected": "no it is not " + RIVERS}
    rows = write(pair, {**pair, "rejected": "nobody knows"}, {**pair, "chosen": pair["chosen"] + "."})
    data = DatasetConfig(path=rows, cleaning={"near_duplicates": 0.8})
    assert len(load_pairs(data, tokenizer, seed=0)[0]) == 2
