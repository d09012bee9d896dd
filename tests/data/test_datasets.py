from __future__ import annotations

import pytest

from rlhf_ray.config.data import DatasetConfig
from rlhf_ray.data.datasets import load_labelled, load_labelled_answers, load_pairs, load_supervised
from rlhf_ray.data.prompts import load_prompts
from rlhf_ray.errors import DataError
from rlhf_ray.models.tokenizers import bpe_tokenizer, char_tokenizer

EOS = 1
CALLS = {"role": "user", "content": "a"}


@pytest.fixture
def tokenizer():
    return char_tokenizer("abcdefgh")  # "a" is 3, "b" 4, ...


@pytest.fixture
def reports():
    return []


def settings(path, **options):
    return DatasetConfig(path=path, **options)


def supervised(path, tokenizer, reports=None, **options):
    on_report = {} if reports is None else {"on_report": reports.append}
    return load_supervised(settings(path, **options), tokenizer, seed=0, **on_report)


# ---- what is learned from which type -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "ids", "learned"),
    [
        ({"prompt": "a", "completion": "b"}, (3, 4, EOS), (False, True, True)),
        ({"text": "ab"}, (3, 4, EOS), (True, True, True)),
        ({"text": "ab", "label": 0}, (3, 4, EOS), (True, True, True)),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, (3, 4, EOS), (False, True, True)),
        ({"prompt": "a", "completions": ["b", "c"]}, (3, 4, EOS), (False, True, True)),
        ({"prompt": "a", "completion": "b", "label": True}, (3, 4, EOS), (False, True, True)),
    ],
)
def test_supervised(write, tokenizer, row, ids, learned):
    ((example,), held_out) = supervised(write(row), tokenizer)
    assert (example.token_ids, example.learned, held_out) == (ids, learned, [])


def test_a_prompt_alone_teaches_nothing(write, tokenizer):
    with pytest.raises(DataError, match=r"data\.jsonl:1: a prompt without an answer.*data\.columns\.completion"):
        supervised(write({"prompt": "a"}), tokenizer)


def test_a_conversation_without_an_answer_teaches_nothing(write, tokenizer):
    with pytest.raises(DataError, match=r"data\.jsonl:1: the conversation holds no answer"):
        supervised(write({"messages": [CALLS]}), tokenizer)


def test_answers_under_another_role_are_told_by_it(write, tokenizer):
    turns = [{"role": "user", "content": "a"}, {"role": "model", "content": "b"}, {"role": "user", "content": "c"}]
    with pytest.raises(DataError, match=r"data\.jsonl:1: .* nothing to learn \(its roles: user, model\)"):
        load_supervised(DatasetConfig(path=write({"messages": turns})), tokenizer, seed=0)


def test_ranked_answers_make_all_their_pairs(write, tokenizer, reports):
    pairs, _ = load_pairs(
        settings(write({"prompt": "a", "completions": ["b", "c", "d", "e"]})), tokenizer, seed=0
    )
    found = [(p.chosen.token_ids[1], p.rejected.token_ids[1], p.margin) for p in pairs]
    assert found == [(4, 5, 0.0), (4, 6, 0.0), (4, 7, 0.0), (5, 6, 0.0), (5, 7, 0.0), (6, 7, 0.0)]
    scored = write({"prompt": "a", "completions": ["b", "c", "d"], "scores": [1, 3, 1]})
    pairs, _ = load_pairs(settings(scored), tokenizer, seed=0, on_report=reports.append)
    found = [(p.chosen.token_ids[1], p.rejected.token_ids[1], p.margin) for p in pairs]
    assert found == [(5, 4, 2.0), (5, 6, 2.0)]
    assert reports[0].dropped == {"equal scores": 1}


def test_labelled_answers(write, tokenizer, reports):
    """A row each; of a pair two, and a conversation's last answer."""
    rows = write({"prompt": "a", "completion": "b", "label": True}, {"prompt": "a", "completion": "bc", "label": 0})
    found, _ = load_labelled_answers(settings(rows), tokenizer, seed=0)
    assert [(e.token_ids, e.learned, e.good) for e in found] == [
        ((3, 4, EOS), (False, True, True), True), ((3, 4, 5, EOS), (False, True, True, True), False),
    ]  # fmt: skip
    pairs = write({"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "b", "chosen": "d", "rejected": "d"})
    found, _ = load_labelled_answers(settings(pairs), tokenizer, seed=0, on_report=reports.append)
    assert [(e.token_ids, e.good) for e in found] == [((3, 4, EOS), True), ((3, 5, EOS), False)]
    assert reports[0].dropped == {"identical answers": 1} and reports[0].kept == 2
    both = write(*({"prompt": "a", "completion": "b", "label": label} for label in (True, False)))
    found, _ = load_labelled_answers(settings(both), tokenizer, seed=0)
    assert [example.good for example in found] == [True, False], "two opinions"


@pytest.mark.parametrize(("row", "message"), [
    ({"prompt": "a", "completion": "b"}, "no answer that is good or bad; dpo.kind=kto needs the fields prompt, comp"),
    ({"text": "ab", "label": 1}, "no answer that is good or bad"),
    ({"prompt": "a", "completions": ["b", "c"]}, "a ranking says which answer is better and not which is good"),
])  # fmt: skip
def test_what_is_no_labelled_answer(write, tokenizer, row, message):
    with pytest.raises(DataError, match=rf"data\.jsonl:1: {message}"):
        load_labelled_answers(settings(write(row)), tokenizer, seed=0)


def test_pairs_need_two_answers(write, tokenizer):
    with pytest.raises(DataError, match=r"data\.jsonl:1: no pair of answers; preferences need the fields chosen"):
        load_pairs(settings(write({"prompt": "a", "completion": "b"})), tokenizer, seed=0)


def test_labelled_texts_are_read_as_a_classifier_reads_them(write, tokenizer):
    texts, _ = load_labelled(settings(write({"text": "ab", "label": 2})), tokenizer, seed=0)
    assert [(t.token_ids, t.label) for t in texts] == [((3, 4), 2)], "no EOS"
    judged, _ = load_labelled(
        settings(write({"prompt": "a", "completion": "b", "label": False})), tokenizer, seed=0
    )
    assert [(t.token_ids, t.label) for t in judged] == [((3, 4), 0)]
    with pytest.raises(DataError, match=r"data\.jsonl:1: a classifier needs a text and its label"):
        load_labelled(settings(write({"text": "ab"})), tokenizer, seed=0)


# ---- cleaning, each reason counted -------------------------------------------------------------------------


def test_what_is_left_out_is_counted_by_reason(write, tokenizer, reports):
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "c", "rejected": "b"},
        {"prompt": "b", "chosen": "c", "rejected": "c"},
        {"prompt": "c", "chosen": " ", "rejected": "b"},
        {"prompt": "d", "chosen": "abcdef", "rejected": "b"},
        {"prompt": "d", "chosen": "ab", "rejected": "b"},
    ]
    data = settings(write(*rows), max_length=4, overlong="drop")
    pairs, _ = load_pairs(data, tokenizer, seed=0, on_report=reports.append)
    assert len(pairs) == 3
    (report,) = reports
    assert (report.rows, report.kept) == (7, 3)
    assert report.dropped == {"duplicate": 1, "identical answers": 1, "empty": 1, "too long": 1}
    assert str(report).endswith(
        "7 rows, 3 examples; left out: 1 duplicate, 1 identical answers, 1 empty, 1 too long"
    )


def test_cleaning_can_be_switched_off(write, tokenizer):
    same = {"prompt": "a", "chosen": "b", "rejected": "b"}
    off = {"duplicates": False, "identical": False, "empty": False}
    pairs, _ = load_pairs(settings(write(same, same), cleaning=off), tokenizer, seed=0)
    assert len(pairs) == 2
    with pytest.raises(DataError, match=r"data\.jsonl:1: field 'chosen' is empty"):
        load_pairs(settings(write({**same, "chosen": ""}), cleaning=off), tokenizer, seed=0)


def test_short_answers_are_left_out(write, tokenizer, reports):
    rows = [{"prompt": "abc", "completion": "d"}, {"prompt": "a", "completion": "bc"}]
    train, _ = supervised(write(*rows), tokenizer, reports, cleaning={"min_response_tokens": 2})
    assert [e.token_ids for e in train] == [(3, 4, 5, EOS)]
    assert reports[0].dropped == {"answer too short": 1}


def test_long_rows_are_refused_dropped_or_truncated(write, tokenizer, reports):
    source = write({"prompt": "a", "completion": "bcd"}, {"prompt": "abcd", "completion": "e"}, {"text": "ab"})
    rows = write({"prompt": "a", "completion": "bcd"}, {"prompt": "abcd", "completion": "e"})
    with pytest.raises(DataError, match=r"data\.jsonl:1: 5 tokens, the limit is 4; raise data\.max_length"):
        supervised(source, tokenizer, max_length=4)
    train, _ = supervised(rows, tokenizer, reports, max_length=4, overlong="truncate")
    assert [(e.token_ids, e.learned) for e in train] == [((3, 4, 5, 6), (False, True, True, True))]
    assert reports[0].dropped == {"too long": 1}, "of the second row nothing learned would be left"
    assert reports[0].cut == 1 and str(reports[0]).endswith("left out: 1 too long; cut at max_length: 1")
    with pytest.raises(DataError, match="nothing usable in .*2 rows, 0 examples; left out: 2 too long"):
        supervised(rows, tokenizer, max_length=4, overlong="drop")


def test_a_classifiers_last_special_token_survives_truncation(write, tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <pad>", special_tokens=[("<pad>", 0)])
    data = settings(write({"text": "abcdef", "label": 1}), max_length=4, overlong="truncate")
    (text,), _ = load_labelled(data, tokenizer, seed=0)
    assert text.token_ids == (3, 4, 5, 0)


def test_bad_answers_are_not_demonstrations(write, tokenizer, reports):
    rows = [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "a", "completion": "c", "label": False}]
    train, _ = supervised(write(*rows), tokenizer, reports)
    assert [e.token_ids for e in train] == [(3, 4, EOS)]
    assert reports[0].dropped == {"labelled as bad": 1}


def test_a_row_of_another_type_than_the_first_is_named(write, tokenizer):
    with pytest.raises(DataError, match=r"data\.jsonl:2: no field 'completion'; the row has 'prompt'"):
        supervised(write({"prompt": "a", "completion": "b"}, {"prompt": "a"}), tokenizer)


# ---- held out ----------------------------------------------------------------------------------------------


def test_no_prompt_is_both_trained_on_and_held_out(write, tokenizer):
    rows = [{"prompt": p, "completion": c} for p in "abcdefgh" for c in "abc"]
    train, held_out = supervised(write(*rows), tokenizer, eval_size=7)
    assert len(held_out) == 6 and len(train) == 18, "two prompts with three answers each fit into seven"
    assert not {e.token_ids[0] for e in train} & {e.token_ids[0] for e in held_out}


def test_the_draw_is_a_function_of_the_seed_only(write, tokenizer):
    rows = [{"prompt": a + b, "completion": "c"} for a in "abcdefgh" for b in "abcdefgh"]
    data = settings(write(*rows), eval_size=8)

    def held_out(seed):
        return load_supervised(data, tokenizer, seed=seed)[1]

    assert held_out(0) == held_out(0) != held_out(1)
    assert len(held_out(0)) == 8


def test_a_file_of_its_own_is_held_out_whole_or_its_first_rows(write, tokenizer, reports):
    train_file = write({"text": "a"}, {"text": "b"}, name="train.jsonl")
    eval_file = write({"text": "c"}, {"text": "d"}, name="eval.jsonl")
    train, held_out = supervised(train_file, tokenizer, reports, eval_path=eval_file)
    assert (len(train), len(held_out)) == (2, 2)
    assert [report.source for report in reports] == [train_file, eval_file]
    assert len(supervised(train_file, tokenizer, eval_path=eval_file, eval_size=1)[1]) == 1


def test_holding_everything_out_is_refused(write, tokenizer):
    with pytest.raises(DataError, match="eval_size=2 would hold out all 2 examples"):
        supervised(write({"text": "a"}, {"text": "b"}), tokenizer, eval_size=2)


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ("a", "each of the 1 prompts has 3 or more; set data.eval_path"),
        ("ab", "each of the 2 prompts has 3 or more; set data.eval_size=3 or more, or set data.eval_path"),
    ],
)
def test_a_held_out_split_that_would_be_empty_is_refused(write, tokenizer, prompts, says):
    rows = [{"prompt": p, "completion": c} for p in prompts for c in "abc"]
    with pytest.raises(DataError, match=f"data.eval_size=2 holds out nothing: .* {says}"):
        supervised(write(*rows), tokenizer, eval_size=2)


def test_limit_reads_only_the_first_rows(write, tokenizer):
    train, _ = supervised(write({"text": "a"}, {"text": "b"}, {"other": "c"}), tokenizer, limit=2)
    assert len(train) == 2


# ---- real data ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bytes_tokenizer():
    return bpe_tokenizer(["abc"], vocab_size=260, max_length=100_000)


def test_real_preferences(shared_data, bytes_tokenizer, reports):
    data = settings(str(shared_data / "hh_harmless.test.jsonl"), max_length=10_000)
    pairs, _ = load_pairs(data, bytes_tokenizer, seed=0, on_report=reports.append)
    assert len(pairs) == 399 and reports[0].dropped == {"empty": 1}
    for pair in pairs:
        prompts = [bytes_tokenizer.decode(e.token_ids[: e.learned.index(True)]) for e in (pair.chosen, pair.rejected)]
        assert prompts[0] == prompts[1] and prompts[0].endswith("\n\nAssistant:")


def test_real_instructions_with_and_without_input(shared_data, bytes_tokenizer):
    examples, _ = supervised(str(shared_data / "alpaca_seed_tasks.jsonl"), bytes_tokenizer, max_length=20_000)
    texts = [bytes_tokenizer.decode(e.token_ids) for e in examples]
    assert len(texts) == 175
    assert sum("### Input:\n" in text for text in texts) == 125
    assert sum("paired with an input" in text for text in texts) == 125
    last = examples[1]
    said = bytes_tokenizer.decode([t for t, learned in zip(last.token_ids, last.learned, strict=True) if learned])
    assert said == "The relation between the given pairs is that they are opposites.<eos>"


def test_real_problems_in_a_chat_template(shared_data, bytes_tokenizer):
    examples, _ = supervised(
        str(shared_data / "gsm8k.test.jsonl"),
        bytes_tokenizer,
        columns={"prompt": "question", "completion": "answer"},
        template="chat",
        chat_template="zephyr",
        max_length=10_000,
    )
    assert len(examples) == 600
    text = bytes_tokenizer.decode(examples[1].token_ids)
    assert text.startswith("<|user|>\nA robe takes 2 bolts of blue fiber") and text.endswith("#### 3<eos>")


def test_real_labels(shared_data, bytes_tokenizer):
    texts, held_out = load_labelled(
        settings(str(shared_data / "movie_reviews.test.jsonl"), eval_size=300), bytes_tokenizer, seed=0
    )
    assert (len(texts), len(held_out)) == (1000, 300) and {text.label for text in texts} == {0, 1}


@pytest.mark.parametrize("template", [{}, {"template": "chat", "chat_template": "zephyr"}], ids=["plain", "chat"])
def test_the_generator_gets_the_prompt_tokens_of_training_on_real_dialogues(shared_data, bytes_tokenizer, template):
    source = str(shared_data / "hh_harmless.test.jsonl")
    prompts = load_prompts(source, bytes_tokenizer, limit=100, **template).token_ids
    data = settings(source, limit=100, max_length=10_000, cleaning={"duplicates": False}, **template)
    pairs, _ = load_pairs(data, bytes_tokenizer, seed=0)
    assert len(pairs) == len(prompts) == 100
    for pair, prompt in zip(pairs, prompts, strict=True):
        for side in (pair.chosen, pair.rejected):
            assert side.token_ids[: len(prompt)] == prompt
            assert not any(side.learned[: len(prompt)]) and side.learned[len(prompt)]


# ---- what a reward model and a classifier read of it ----------------------------------------------------------


def test_answers_that_are_equal_once_they_are_cut_are_left_out_and_counted(write, tokenizer):
    reports, row = [], {"prompt": "a", "chosen": "bca", "rejected": "bcb"}
    other = {"prompt": "a", "chosen": "b", "rejected": "c"}
    cut = settings(write(row, other), max_length=3, overlong="truncate")
    for judged in (False, True):
        pairs, _ = load_pairs(cut, tokenizer, seed=0, on_report=reports.append, judged=judged)
        assert len(pairs) == 1 and reports.pop().dropped == {"identical answers": 1}
    off = settings(cut.path, max_length=3, overlong="truncate", cleaning={"identical": False})
    kept, _ = load_pairs(off, tokenizer, seed=0)
    assert len(kept) == 2


def test_answers_that_a_template_trims_to_the_same_are_left_out(write, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | trim }}{{ eos_token }}{% endfor %}"
    ask, reports = {"role": "user", "content": "a"}, []
    one, two = ({"role": "assistant", "content": content} for content in ("b", "b "))
    row = {"prompt": [ask], "chosen": [one], "rejected": [two]}
    other = {"prompt": [ask], "chosen": [one], "rejected": [{**one, "content": "c"}]}
    ((pair,), _) = load_pairs(settings(write(row, other)), tokenizer, seed=0, on_report=reports.append, judged=True)
    assert reports[0].dropped == {"identical answers": 1}
    assert pair.chosen.token_ids == (3, EOS, 4, EOS), "of a conversation, what ends the turn is read"


def test_a_classifier_reads_a_conversation_as_a_reward_model_does(write, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    said = {"role": "assistant", "content": "b"}
    row = {"prompt": [{"role": "user", "content": "a"}], "completion": [said], "label": 1}
    ((item,), _) = load_labelled(settings(write(row)), tokenizer, seed=0)
    assert (item.token_ids, item.label) == ((3, EOS, 4, EOS), 1)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="data.jsonl:1: these are chat messages, and the tokenizer has no EOS"):
        load_labelled(settings(write(row)), tokenizer, seed=0)
