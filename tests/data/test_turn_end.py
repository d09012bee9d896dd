"""What ends an assistant's turn: found out from the template, learned once in every turn, never written twice."""

from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing

from rlhf_ray.data.chat import Chat
from rlhf_ray.data.encoding import Encoder
from rlhf_ray.data.turn_end import TurnEnd, end_of_turn, turn_end_ids, with_turn_ends
from rlhf_ray.errors import DataError
from rlhf_ray.models.tokenizers import bpe_tokenizer

SPECIAL = ["<bos>", "<|me|>", "<|you|>", "<|tool|>", "<|stop|>", "<|call|>"]
TALK = (
    {"role": "user", "content": "Tide?"},
    {"role": "assistant", "content": "Low."},
    {"role": "user", "content": "Wind?"},
    {"role": "assistant", "content": "West."},
)
CALL = {"role": "assistant", "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}]}  # fmt: skip
RESULT = {"role": "tool", "name": "look", "content": "grey"}


def template(answer, *, user="{{ m.content }}<|stop|>", prompt="<|me|>", last=""):
    """User's and assistant's markers, and what is written of an answer."""
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|me|>" + answer + "{% elif m.role == 'tool' %}<|tool|>"
        "{{ m.content }}{% else %}<|you|>" + user + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + prompt + "{% else %}" + last + "{% endif %}"
    )


CALLED = "{{ c.function.name }}{% for k, v in c.function.arguments.items() %}:{{ k }}={{ v }}{% endfor %}"
SAYS = "{{ m.content }}{% for c in m.tool_calls or [] %}" + CALLED + "{% endfor %}"


@pytest.fixture
def tokenizer():
    """One token a byte; its EOS is not what ends a turn."""
    made = bpe_tokenizer(["a"], vocab_size=258)
    made.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": SPECIAL[1:]})
    return made


def learned(tokenizer, examples):
    return [
        tokenizer.decode([t for t, is_learned in zip(e.token_ids, e.learned, strict=True) if is_learned])
        for e in examples
    ]


@pytest.mark.parametrize(("written", "right"), [
    # what both have in common; white space behind it is the template's
    (template(SAYS + "<|stop|>\n"), TurnEnd("<|stop|>", "<|stop|>")),
    # an end of the whole conversation is none of the turn
    (template(SAYS + "<|stop|>\n", last="<eos>"), TurnEnd("<|stop|>", "<|stop|>")),
    # nothing but that
    (template(SAYS, user="{{ m.content }}", last="<eos>"), TurnEnd("<eos>", "<eos>")),
    # the next role's marker
    (template(SAYS, user="{{ m.content }}"), TurnEnd("<|you|>", "<|tool|>")),
    # one token behind an answer, another behind a call
    (template(SAYS + "{{ '<|call|>' if m.tool_calls else '<|stop|>' }}"), TurnEnd("<|stop|>", "<|call|>")),
    # what stands behind each of several calls ends none
    (template("{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.key }}<|call|>{% endfor %}\n"),
     TurnEnd("<|you|>", "")),
    # text only
    ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", TurnEnd("", "")),
])  # fmt: skip
def test_what_ends_a_turn_is_found_out_from_the_template(tokenizer, written, right):
    tokenizer.chat_template = written
    assert end_of_turn(tokenizer) == right
    names = ["<eos>", *(name for name in (right.answer, right.call) if name)]
    assert turn_end_ids(tokenizer) == tuple(dict.fromkeys(tokenizer.convert_tokens_to_ids(names)))


def test_without_a_template_eos_ends_a_turn(tokenizer):
    assert end_of_turn(tokenizer) == TurnEnd() and turn_end_ids(tokenizer) == (tokenizer.eos_token_id,)


def test_a_sampled_answer_stops_at_what_ends_a_turn_too(tokenizer):
    tokenizer.chat_template = template(SAYS, user="{{ m.content }}")
    assert with_turn_ends([7], tokenizer) == (7, *tokenizer.convert_tokens_to_ids(["<eos>", "<|you|>", "<|tool|>"]))


def test_what_ends_a_turn_is_learned_where_the_marks_leave_it_out(tokenizer):
    tokenizer.chat_template = template("{% generation %}{{ m.content }}{% endgeneration %}{{ '\n' }}<|stop|>\n")
    assert learned(tokenizer, Encoder(tokenizer).conversation(Chat(TALK))) == ["Low.\n<|stop|>West.\n<|stop|>"]


def test_the_next_roles_marker_is_learned_also_behind_the_last_answer(tokenizer):
    tokenizer.chat_template = template(SAYS, user="{{ m.content }}")
    (example,) = Encoder(tokenizer).conversation(Chat(TALK))
    assert tokenizer.decode(example.token_ids) == "<|you|>Tide?<|me|>Low.<|you|>Wind?<|me|>West.<|you|>"
    assert learned(tokenizer, [example]) == ["Low.<|you|>West.<|you|>"]
    called = Chat((TALK[0], CALL, RESULT, TALK[1]))
    (example,) = Encoder(tokenizer).conversation(called)
    assert learned(tokenizer, [example]) == ["look:at=sky<|tool|>Low.<|you|>"]


def test_a_turn_that_ends_otherwise_in_the_middle_is_learned_as_the_last_of_its_own_sequence(tokenizer):
    end = "{{ '<|stop|>' if loop.last else '<|call|>' }}"
    tokenizer.chat_template = template("{% generation %}{{ m.content }}" + end + "{% endgeneration %}")
    first, second = Encoder(tokenizer).conversation(Chat(TALK))
    assert learned(tokenizer, [first, second]) == ["Low.<|stop|>", "West.<|stop|>"]
    assert "Low.<|call|>" in tokenizer.decode(second.token_ids)


def test_a_given_answer_ends_as_the_policys_own_would(tokenizer):
    tokenizer.chat_template = template(SAYS + "<|stop|>\n")
    ids = Encoder(tokenizer).completion(Chat(TALK[:1]), "Low.")
    assert tokenizer.decode(ids) == "Low.<|stop|>"
    assert Encoder(tokenizer).completion("Tide?", "Low.") == (*tokenizer("Low.")["input_ids"], tokenizer.eos_token_id)


# ---- thoughts -----------------------------------------------------------------------------------------------

CUT = "{{ m.content.split('</think>')[-1] }}<|stop|>"


def thinking(thought, said):
    return {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{said}"}


def test_a_thought_that_the_template_cuts_out_is_learned_behind_the_prompt_that_opens_it(tokenizer):
    tokenizer.chat_template = template(CUT, prompt="<|me|><think>\n")
    chat = Chat((TALK[0], thinking("moon", "Low."), TALK[2], thinking("sun", "West.")))
    encoder = Encoder(tokenizer)
    first, second = encoder.conversation(chat)
    assert learned(tokenizer, [first, second]) == ["moon\n</think>\n\nLow.<|stop|>", "sun\n</think>\n\nWest.<|stop|>"]
    for example, asked in ((first, 1), (second, 3)):
        prompt = encoder.prompt(chat.with_messages(chat.messages[:asked]))[1]
        assert example.token_ids[: len(prompt)] == prompt
    assert "moon" not in tokenizer.decode(second.token_ids)
    assert encoder.answer(chat.with_messages(chat.messages[:1]), chat.messages[1:2]) == first
    apart = {"role": "assistant", "reasoning_content": "moon", "content": "Low."}
    assert encoder.answer(Chat(chat.messages[:1]), (apart,)) == first


def test_a_thought_that_the_prompt_does_not_open_is_learned_whole(tokenizer):
    tokenizer.chat_template = template(CUT)
    (example,) = Encoder(tokenizer).conversation(Chat((TALK[0], thinking("moon", "Low."))))
    assert learned(tokenizer, [example]) == ["<think>\nmoon\n</think>\n\nLow.<|stop|>"]


def test_an_answer_without_a_thought_follows_the_opened_one(tokenizer):
    empty = template("<think></think>{{ m.content }}<|stop|>", prompt="<|me|><think>\n")
    for written, right in ((template(CUT, prompt="<|me|><think>\n"), "Low.<|stop|>"), (empty, "</think>Low.<|stop|>")):
        tokenizer.chat_template = written
        (example,) = Encoder(tokenizer).conversation(Chat(TALK[:2]))
        assert learned(tokenizer, [example]) == [right]
        assert tokenizer.decode(example.token_ids) == f"<|you|>Tide?<|stop|><|me|><think>\n{right}"


# ---- unfinished answers -------------------------------------------------------------------------------------


def test_an_answer_goes_on_with_an_unfinished_turn(tokenizer):
    tokenizer.chat_template = template(SAYS + "<|stop|>\n")
    begun = Chat((*TALK[:2], TALK[2], {"role": "assistant", "content": "It is "}))
    encoder = Encoder(tokenizer)
    for answer in ("west.", ({"role": "assistant", "content": "west."},)):
        example = encoder.answer(begun, answer)
        assert learned(tokenizer, [example]) == ["west.<|stop|>"]
        prompt = encoder.prompt(begun)[1]
        assert example.token_ids[: len(prompt)] == prompt and tokenizer.decode(prompt).endswith("<|me|>It is ")
        assert tokenizer.decode(encoder.completion(begun, answer)) == "west.<|stop|>"
    with pytest.raises(DataError, match="unfinished answer that is no text"):
        encoder.answer(Chat((TALK[0], {**CALL, "content": None})), "west.")


# ---- texts that are rendered already ------------------------------------------------------------------------


@pytest.fixture
def beginning(tokenizer):
    """A tokenizer that puts BOS before every text."""
    bos = ("<bos>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    tokenizer.chat_template = template(SAYS + "<|stop|>\n")
    return tokenizer


@pytest.mark.parametrize("style", ["auto", "none", "chat"])
def test_a_rendered_text_gets_no_second_bos_and_no_second_end(beginning, style):
    encoder, asked = Encoder(beginning, style=style), "<bos><|you|>Tide?<|stop|><|me|>"
    assert beginning.decode(encoder.prompt(asked)[1]) == asked
    for end in ("<|stop|>", "<|stop|>\n", "<eos>"):
        example = encoder.answer(asked, f"Low.{end}")
        assert beginning.decode(example.token_ids) == f"{asked}Low.{end}"
        assert learned(beginning, [example]) == [f"Low.{end}"]
        assert beginning.decode(encoder.text(f"{asked}Low.{end}").token_ids) == f"{asked}Low.{end}"
    assert learned(beginning, [encoder.answer(asked, "Low.")]) == ["Low.<|stop|>"], "it ends as a turn does"
    assert beginning.decode(encoder.text("Low.").token_ids) == "<bos>Low.<eos>"


def test_an_end_of_turn_that_the_data_carry_in_an_answer_is_written_once(tokenizer):
    tokenizer.chat_template = template("{% generation %}{{ m.content }}<|stop|>{% endgeneration %}\n")
    ask, say = TALK[0], {"role": "assistant", "content": "Low."}
    carried = {**say, "content": "Low.<|stop|>\n"}
    encoder = Encoder(tokenizer, style="chat")
    assert encoder.conversation(Chat((ask, carried))) == encoder.conversation(Chat((ask, say)))
    right = encoder.answer(Chat((ask,)), (say,))
    assert encoder.answer(Chat((ask,)), (carried,)) == right == encoder.answer(ask["content"], "Low.<|stop|>")
