from __future__ import annotations

import pytest

from rlhf_ray.data.prompt_rows import first_words
from rlhf_ray.data.prompts import load_prompts, load_texts, vocabulary_texts
from rlhf_ray.errors import DataError
from rlhf_ray.models.tokenizers import char_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[go]{% endif %}"
)


@pytest.fixture
def tokenizer():
    return char_tokenizer("abcdefghijklmnopqrstuvwxyz []")  # " " is 3, "[" 4, "]" 5, "a" 6, ...


def test_prompts_columns_and_tokens(write, tokenizer):
    source = write({"prompt": "ab", "answer": "c"}, {"prompt": "b a", "answer": "d"})
    prompts = load_prompts(source, tokenizer)
    assert [e.prompt for e in prompts.examples] == ["ab", "b a"]
    assert [e.columns for e in prompts.examples] == [{"answer": "c"}, {"answer": "d"}]
    assert prompts.token_ids == ((6, 7), (7, 3, 6))
    assert prompts.examples[1].where == f"{source}:2"
    assert len(prompts) == 2 and prompts.dropped == {}


def test_the_field_is_found_or_named(write, tokenizer):
    assert load_prompts(write({"text": "ab"}), tokenizer).examples[0].prompt == "ab"
    both = write({"text": "ab", "question": "cd"})
    named = load_prompts(both, tokenizer, field="question").examples[0]
    assert (named.prompt, named.columns) == ("cd", {"text": "ab"})
    usual = load_prompts(write({"question": "cd", "answer": 4}), tokenizer).examples[0]
    assert (usual.prompt, usual.columns) == ("cd", {"answer": 4})
    with pytest.raises(DataError, match=r"data\.jsonl:1: none of the fields .*'puzzle'.*data\.field"):
        load_prompts(write({"puzzle": "cd"}), tokenizer)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": ""}, "is empty"),
        ({"prompt": " \n"}, "is empty"),
        ({"other": "x"}, "no field 'prompt'; the row has 'other'"),
        ({"prompt": 3}, "is of type int, not text"),
        ({"prompt": None}, "is of type NoneType, not text"),
        ({"prompt": []}, "an empty list of messages"),
        ({"prompt": ["hello"]}, "'hello', which is no message"),
        ({"prompt": [{"content": "hello"}]}, "a message without a role"),
        ({"prompt": [{"role": "user", "content": ""}]}, "a message without content"),
        ({"prompt": [{"role": "assistant", "content": "hi"}]}, "an answer but no question"),
    ],
)
def test_a_bad_row_is_named(write, tokenizer, row, says):
    with pytest.raises(DataError, match=rf"data\.jsonl:2: .*{says}"):
        load_prompts(write({"prompt": "fine"}, row), tokenizer)


def test_chat_without_template_is_refused(write, tokenizer):
    source = write({"messages": [{"role": "user", "content": "hi"}]})
    with pytest.raises(DataError, match=r"data\.jsonl:1: .*no chat template; use an instruction-tuned model"):
        load_prompts(source, tokenizer)


def test_chat_is_templated_and_ends_where_the_assistant_begins(write, tokenizer):
    tokenizer.chat_template = TEMPLATE
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    question, answered = load_prompts(write({"messages": turns[:1]}, {"messages": turns}), tokenizer).examples
    assert question.prompt == answered.prompt == "[user]hi[go]"
    more = [*turns, {"role": "user", "content": "so"}]
    assert load_prompts(write({"prompt": more}), tokenizer).examples[0].prompt == "[user]hi[assistant]yo[user]so[go]"


def test_every_type_of_dataset_is_a_source_of_prompts(write, tokenizer):
    tokenizer.chat_template = TEMPLATE
    ask, say = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}

    def one(**row):
        (example,) = load_prompts(write(row), tokenizer).examples
        return example.prompt, example.columns

    judge = {"style": "rule", "ground_truth": "d"}
    assert one(prompt=[ask], data_source="x", reward_model=judge) == (
        "[user]hi[go]",
        {"data_source": "x", "reward_model": judge},
    )
    assert one(prompt="ab", completion="cd") == ("ab", {"completion": "cd"})
    assert one(chosen=[ask, say], rejected=[ask, ask | {"role": "assistant"}])[0] == "[user]hi[go]"
    assert one(text="ab", label=1) == ("ab", {"label": 1})
    assert one(prompt="ab", completions=["c", "d"]) == ("ab", {}), "a reward function gets its own completions"


def test_a_pair_with_an_empty_answer_is_left_out_and_counted(write, tokenizer):
    dialogue = "\n\nHuman: hi\n\nAssistant:"
    source = write(
        {"chosen": f"{dialogue} a", "rejected": dialogue}, {"chosen": f"{dialogue} a", "rejected": f"{dialogue} b"}
    )
    prompts = load_prompts(source, tokenizer)
    assert [e.prompt for e in prompts.examples] == [dialogue] and prompts.dropped == {"empty": 1}


def test_plain_prompts_in_the_chat_template(write, tokenizer):
    source = write({"question": "ab", "answer": "c"})
    options = {"field": "question", "template": "chat", "chat_template": "zephyr", "system_prompt": "be"}
    (example,) = load_prompts(source, tokenizer, **options).examples
    assert example.prompt == "<|system|>\nbe<eos>\n<|user|>\nab<eos>\n<|assistant|>\n"
    assert example.columns == {"answer": "c"}
    assert "<|assistant|>" in tokenizer.chat_template, "it is saved with the model"


def test_cutting_words_off_a_chat_is_refused(write, tokenizer):
    with pytest.raises(DataError, match=r"data\.jsonl:1: data\.prompt_words cuts plain texts"):
        load_prompts(write({"prompt": [{"role": "user", "content": "hi you"}]}), tokenizer, prompt_words=1)


def test_reference_answers_end_in_eos_and_count_from_behind_the_prompt(write, tokenizer):
    source = write({"prompt": "ab", "answer": ["cd", "abc"]})
    assert load_prompts(source, tokenizer, reference_field="answer").answers == (((8, 9, 1), (8, 1)),)
    with pytest.raises(DataError, match=r"data\.jsonl:1: the reference answer is None, not a text"):
        load_prompts(source, tokenizer, reference_field="gold")


def test_bos_is_added_to_plain_text_but_not_after_a_template(write, tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    tokenizer.chat_template = TEMPLATE
    source = write({"prompt": "ab"}, {"prompt": [{"role": "user", "content": "hi"}]})
    plain, chat = load_prompts(source, tokenizer).token_ids
    assert plain == (1, 6, 7)
    assert chat[0] == 4


def test_long_prompts_are_refused_or_counted(write, tokenizer):
    source = write({"prompt": "abc"}, {"prompt": "abcd"}, {"prompt": "ab"})
    with pytest.raises(DataError, match=r"data\.jsonl:2: the prompt has 4 tokens, the limit is 3"):
        load_prompts(source, tokenizer, max_prompt_tokens=3)
    prompts = load_prompts(source, tokenizer, max_prompt_tokens=3, overlong="drop")
    assert [e.prompt for e in prompts.examples] == ["abc", "ab"]
    assert prompts.dropped == {"long": 1}
    with pytest.raises(DataError, match="no usable prompt .3 longer than max_prompt_tokens"):
        load_prompts(source, tokenizer, max_prompt_tokens=1, overlong="drop")


def test_a_file_without_rows_is_refused(write, tokenizer):
    with pytest.raises(DataError, match="no usable prompt .it has no rows"):
        load_prompts(write(), tokenizer)


def test_prompts_are_the_first_words_of_longer_texts(write, tokenizer):
    source = write({"text": "a bc  d ef", "label": 1}, {"text": "a bc", "label": 0})
    prompts = load_prompts(source, tokenizer, field="text", prompt_words=2)
    assert [e.prompt for e in prompts.examples] == ["a bc"]
    assert prompts.examples[0].columns == {"label": 1, "text": "a bc  d ef"}
    assert prompts.dropped == {"short": 1}
    assert first_words("a b c", 3) is None and first_words("a b c", 2) == "a b"


def test_the_first_words_of_text_without_blanks_are_characters():
    assert first_words("今天天气很好，我们去公园", 4) == "今天天气"
    assert first_words("今天很好，我们 去公园", 5) == "今天很好，我", "punctuation is no word of its own"
    assert first_words("用 GPT模型\n很好", 4) == "用 GPT模型", "blanks of the text stay"
    assert first_words("天气很好", 4) is None and first_words("天气很好", 3) == "天气很"
    assert first_words("ที่นี่ดี", 2) == "ที่นี่"
    assert first_words("हिन्दी में लिखो", 2) == "हिन्दी में"


def test_limit_stops_reading(write, tokenizer):
    source = write({"prompt": "a"}, {"prompt": "b"}, {"prompt": ""})
    assert len(load_prompts(source, tokenizer, limit=2)) == 2


def test_a_task_is_a_source():
    tokenizer = char_tokenizer("0123456789+=")
    train, test = (load_prompts("task:arithmetic", tokenizer, split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (7600, 500)
    assert all(2 not in ids for ids in train.token_ids)  # no <unk>
    one = train.examples[0]
    left, right = one.prompt.rstrip("=").split("+")
    assert one.columns == {"answer": str(int(left) + int(right))}


def test_the_real_reviews(shared_data):
    source = str(shared_data / "movie_reviews.test.jsonl")
    texts = load_texts(source)
    assert len(texts) == 1300 and texts[0] == "the sweetest thing leaves a bitter taste ."
    prompts = load_prompts(source, char_tokenizer(texts), field="text", prompt_words=4)
    assert len(prompts) + prompts.dropped["short"] == 1300
    assert prompts.examples[0].prompt == "the sweetest thing leaves"
    with pytest.raises(DataError, match=r"reviews\.test\.jsonl:1: no field 'body'"):
        load_texts(source, field="body")


def test_a_vocabulary_needs_no_more_of_a_row_than_its_prompt(write):
    """A policy is asked the prompt alone: whether its answer can be read is no business of its tokenizer."""
    source = write({"prompt": "ab", "completion": "cd"}, {"prompt": "ef", "completion": None})
    assert vocabulary_texts(source) == ["ab\ncd", "ef"]
    with pytest.raises(DataError, match=":2: .*completion"):
        load_texts(source)
