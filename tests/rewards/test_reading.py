"""What a judge reads, in every case but that of its own chat template (tests/data/test_golden_turns.py)."""

from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing

from rlhf_ray.data.chat import Chat
from rlhf_ray.data.encoding import Encoder
from rlhf_ray.data.templates import CHAT_TEMPLATES
from rlhf_ray.errors import RewardError
from rlhf_ray.models.tokenizers import bpe_tokenizer, build_tokenizer
from rlhf_ray.rewards.reading import Answered, Reader

CHAT = Chat(({"role": "user", "content": "ab"},))


@pytest.fixture
def merging():
    """A byte-level BPE in which "ab" + "cd" is one token."""
    return bpe_tokenizer(["abcd"] * 9, vocab_size=262)


def ids(tokenizer, text):
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_plain_text_is_read_as_rm_learns_it_also_where_tokens_would_merge(merging):
    encoder = Encoder(merging)
    learned = encoder.as_judged("ab", encoder.answer("ab", "cd"))
    assert learned.token_ids == (*ids(merging, "ab"), *ids(merging, "cd")) != ids(merging, "abcd")
    assert Reader(merging, scores_pairs=True).read(Answered("ab", "cd")) == learned.token_ids
    assert Reader(merging, scores_pairs=False).read(Answered("ab", "cd")) == "abcd", "a classifier learns whole texts"


def test_a_word_tokenizers_blank_before_the_answer_changes_nothing():
    words = build_tokenizer("word", ["it was good"])
    encoder = Encoder(words)
    learned = encoder.as_judged("it was", encoder.answer("it was", "good")).token_ids
    assert Reader(words, scores_pairs=True).read(Answered("it was", " good")) == learned


def test_a_rendered_text_is_read_without_a_second_bos_and_up_to_the_end_of_its_turn(merging):
    merging.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": ["<|stop|>"]})
    bos = ("<bos>", merging.bos_token_id)
    merging.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    merging.chat_template = "{% for m in messages %}{{ m.content }}<|stop|>{% endfor %}"
    encoder, reader = Encoder(merging), Reader(merging, scores_pairs=True)
    for answer in ("cd", "cd<|stop|>", "cd<|stop|>\n"):
        judged = encoder.as_judged("<bos>ab<|stop|>", encoder.answer("<bos>ab<|stop|>", answer))
        assert merging.decode(judged.token_ids) == "<bos>ab<|stop|>cd<|stop|>"
    assert reader.read(Answered("<bos>ab<|stop|>", "cd")) == judged.token_ids
    assert reader.read(Answered("<bos>ab<|stop|>", "cd", finished=False)) == judged.token_ids[:-1]
    assert merging.decode(reader.read(Answered("<bos>ab", "cd"))) == "<bos>abcd", "no turn: a plain text"


def test_what_a_tokenizer_puts_behind_every_text_is_read_in_training_too(merging):
    merging.add_special_tokens({"sep_token": "<sep>"})
    sep = ("<sep>", merging.sep_token_id)
    merging.backend_tokenizer.post_processor = TemplateProcessing(single="$A <sep>", special_tokens=[sep])
    encoder = Encoder(merging)
    judged = encoder.as_judged("x", encoder.answer("x", "y"))
    assert merging.decode(judged.token_ids) == "xy<sep>" and judged.learned == (False, True, False)


def test_a_judge_without_a_template_reads_what_the_policys_has_written(merging):
    answered = Answered("<|user|>ab", "cd", CHAT, "cd")
    assert merging.decode(Reader(merging, scores_pairs=True).read(answered)) == "<|user|>abcd"
    bert = bpe_tokenizer(["a"], vocab_size=258)
    bert.eos_token = None
    bert.chat_template = CHAT_TEMPLATES["zephyr"]
    assert Reader(bert, scores_pairs=True).read(answered) == "<|user|>abcd", "without EOS no turn ends"


def test_the_policys_own_tokens_are_read_by_a_judge_with_its_tokenizer(merging):
    merging.chat_template = CHAT_TEMPLATES["zephyr"]
    answered = Answered("ab", "cd", CHAT, "cd", ids=(5, 6, 7))
    assert Reader(merging, scores_pairs=True, policy=merging).read(answered) == (5, 6, 7)
    other = bpe_tokenizer(["abcd"] * 9, vocab_size=262)
    other.chat_template = "{# another #}" + CHAT_TEMPLATES["zephyr"]
    read = Reader(merging, scores_pairs=True, policy=other).read(answered)
    assert merging.decode(read) == "<|user|>\nab<eos>\n<|assistant|>\ncd<eos>"


def test_a_judge_whose_template_refuses_the_conversation_says_so(merging):
    merging.chat_template = "{{ raise_exception('no users') }}"
    with pytest.raises(RewardError, match="its tokenizer cannot write the conversation: .*no users"):
        Reader(merging, scores_pairs=True).read(Answered("ab", "cd", CHAT, "cd"))
