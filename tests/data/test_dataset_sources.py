"""Several sources of supervised rows: columns and templates of their own, duplicates and held-out rows across them."""

from __future__ import annotations

import hashlib
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


def turns(question, answer, parts=False):
    asked = [{"type": "text", "text": part} for part in (question[:1], question[1:])] if parts else question
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def test_a_prompt_is_one_in_every_form_that_it_is_written_in(write, tokenizer):
    questions = [letter + "bc" for letter in LETTERS[:12]]
    forms = {
        "plain": [{"prompt": q, "completion": "x"} for q in questions],
        "turns": [turns(q, "y") for q in questions],
        "parts": [turns(q, "z", parts=True) for q in questions],
        "tasks": [{"instruction": q, "output": "w"} for q in questions],
        "hh": [{"prompt": f"\n\nHuman: {q}\n\nAssistant:", "completion": " v"} for q in questions],
    }
    sources = [write(*rows, name=f"{name}.jsonl") for name, rows in forms.items()]
    data = {"sources": sources, "template": "chat", "chat_template": "zephyr", "eval_size": 20}
    train, held_out, reports = load(data, tokenizer)
    assert len(held_out) == 20 and len(train) == 40, "four questions in five forms"
    asked = [{q for item in items for q in questions if q in text(tokenizer, item)} for items in (train, held_out)]
    assert len(asked[1]) == 4 and not asked[0] & asked[1]


def test_the_order_of_the_forms_changes_no_draw(write, tokenizer):
    plain = [{"prompt": letter * 2, "completion": "x"} for letter in LETTERS[:12]]
    first, second = write(*plain, name="a.jsonl"), write(*(turns(r["prompt"], "y") for r in plain), name="b.jsonl")
    data = {"template": "chat", "chat_template": "zephyr", "eval_size": 6}
    drawn = [{text(tokenizer, i) for i in load({**data, "sources": s}, tokenizer)[1]} for s in (
        [first, second], [second, first])]  # fmt: skip
    assert drawn[0] == drawn[1] and len(drawn[0]) == 6


def test_prompts_of_one_form_are_drawn_by_the_hash_of_that_form(write, tokenizer):
    file = write(*({"prompt": letter, "completion": "x"} for letter in LETTERS))
    _, held_out, _ = load({"path": file, "eval_size": 3}, tokenizer, seed=7)
    first = sorted(LETTERS, key=lambda letter: hashlib.blake2b(f"7/{letter!r}".encode()).digest())[:3]
    assert {text(tokenizer, item)[0] for item in held_out} == set(first), "runs of older versions are resumed"


@pytest.mark.parametrize(
    ("other", "kept"),
    [
        (turns("ab", "x"), 1),
        (turns("ab", "x", parts=True), 1),
        ({"prompt": turns("ab", "x")["messages"][:1], "completion": "x"}, 1),
        ({"instruction": "ab", "output": "x"}, 1),
        (turns("ab", "y"), 2),
        ({"prompt": [{"role": "system", "content": "c"}, *turns("ab", "x")["messages"][:1]], "completion": "x"}, 2),
        ({"messages": [*turns("ab", "x")["messages"], *turns("ab", "x")["messages"]]}, 2),
        ({"messages": turns("ab", "x")["messages"], "chat_template_kwargs": {"c": 1}}, 2),
    ],
)
def test_a_row_in_another_form_is_a_duplicate(write, tokenizer, other, kept):
    first = write({"prompt": "ab", "completion": "x"}, name="first.jsonl")
    data = {"sources": [first, write(other, name="second.jsonl")], "template": "chat", "chat_template": "zephyr"}
    if kept == 1:
        with pytest.raises(DataError, match="nothing usable in .*second.jsonl: 1 rows.* 1 duplicate"):
            load(data, tokenizer)
    else:
        assert len(load(data, tokenizer)[0]) == 2


def test_an_answer_that_is_weighed_otherwise_is_no_duplicate(write, tokenizer):
    ask, first, again, last = turns("ab", "x")["messages"] + turns("cd", "y")["messages"]
    rows = [{"messages": [ask, {**first, **weight}, again, last]} for weight in ({}, {"weight": 0}, {"weight": 1})]
    train, _, reports = load({"path": write(*rows), "chat_template": "zephyr"}, tokenizer)
    assert len(train) == 2 and reports[0].dropped == {"duplicate": 1}, "a weight of 1 says nothing new"


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
