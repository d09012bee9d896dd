"""Agents' conversations (thought, call, reply, thought, answer) under every chat template of TRL's that reads them."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from rlhf_ray.data.chat import Chat
from rlhf_ray.data.encoding import Encoder
from rlhf_ray.errors import DataError
from tests.data.make_golden_turns import CALLING, TOOLS, tokenizer_for
from tests.data.make_golden_turns import templates as all_templates

if find_spec("trl") is None:
    pytest.skip("TRL is not installed", allow_module_level=True)
TEMPLATES = all_templates()
QUESTION, CALL, REPLY, ANSWER, SECOND, LAST = CALLING
CALLED = '<|start|>assistant to=functions.lookup_tide<|channel|>commentary json<|message|>{"harbour": "Bergen"}<|call|>'
TOLD = '<|start|>functions.lookup_tide to=assistant<|channel|>commentary<|message|>"12 dm"<|end|>'
FIRST_THOUGHT = "<|start|>assistant<|channel|>analysis<|message|>I must look.<|end|>"
LAST_THOUGHT = "<|start|>assistant<|channel|>analysis<|message|>Ten dm a metre.<|end|>"
SAID = "<|start|>assistant<|channel|>final<|message|>It is 1.2 metres."


def learned(tokenizer, example):
    return tokenizer.decode([t for t, known in zip(example.token_ids, example.learned, strict=True) if known])


@pytest.mark.parametrize("name", ["gptoss", "gptoss_training"])
@pytest.mark.parametrize("beside", [{"thinking": "I must look."}, {"content": "I must look."}])
def test_gptoss_learns_the_thoughts_of_calls_and_of_the_answer(name, beside):
    """The generator sees the thought before its call; the template drops it only where the answer follows."""
    tokenizer = tokenizer_for(TEMPLATES[name])
    call, answer = {**CALL, **beside}, {**ANSWER, "thinking": "Ten dm a metre."}
    (example,) = Encoder(tokenizer).conversation(Chat((QUESTION, call, REPLY, answer), tuple(TOOLS)))
    asked = tokenizer.apply_chat_template([QUESTION], tools=TOOLS, tokenize=False)
    turns = [FIRST_THOUGHT + CALLED, LAST_THOUGHT + SAID + "<|return|>"]
    assert tokenizer.decode(example.token_ids) == asked + turns[0] + TOLD + turns[1]
    if name == "gptoss":  # it marks nothing: the generation prompt is not learned
        turns = [turn.removeprefix("<|start|>assistant") for turn in turns]
    assert learned(tokenizer, example) == "".join(turns)
    prompt = Encoder(tokenizer).prompt(Chat((QUESTION, call, REPLY), tuple(TOOLS)))[1]
    assert example.token_ids[: len(prompt)] == prompt, "as in reinforcement learning"


def test_gptoss_drops_the_thoughts_once_another_question_follows():
    """Then each answer is learned behind its own prompt; the later prompt names what it left out."""
    tokenizer = tokenizer_for(TEMPLATES["gptoss"])
    call, answer = {**CALL, "thinking": "I must look."}, {**ANSWER, "thinking": "Ten dm a metre."}
    chat, encoder = Chat((QUESTION, call, REPLY, answer, SECOND, LAST), tuple(TOOLS)), Encoder(tokenizer)
    examples = encoder.conversation(chat)
    assert [learned(tokenizer, example) for example in examples] == [
        (FIRST_THOUGHT + CALLED).removeprefix("<|start|>assistant"),
        (LAST_THOUGHT + SAID).removeprefix("<|start|>assistant") + "<|return|>",
        "<|channel|>final<|message|>Nobody knows.<|return|>",
    ]
    later = tokenizer.decode(examples[2].token_ids)
    assert later == tokenizer.apply_chat_template(list(chat.messages), tools=TOOLS, tokenize=False)
    assert "messages[] thoughts of an answer before the last" not in encoder.take_unused(), "all are learned"
    encoder.prompt(chat.with_messages(chat.messages[:-1]))
    assert "messages[] thoughts of an answer before the last" in encoder.take_unused()


def test_an_answer_whose_place_cannot_be_told_is_still_refused():
    """What the thoughts led to is written otherwise without them: it is not the same answer."""
    tokenizer = tokenizer_for("""{% for m in messages %}{{ '<|start|>' + m.role + '<|message|>' }}
    {%- if m.thinking and (add_generation_prompt or loop.last) %}{{ m.thinking }}{% endif %}
    {%- if m.thinking and not add_generation_prompt and not loop.last %}{{ 'thought' }}{% endif %}
    {{- m.content + '<|end|>' }}{% endfor %}
    {%- if add_generation_prompt %}{{ '<|start|>assistant<|message|>' }}{% endif %}""")
    call, answer = {**ANSWER, "thinking": "Hm."}, {**LAST}
    with pytest.raises(DataError, match="not the beginning of its text with the answer .message 4"):
        Encoder(tokenizer, learn="last").conversation(Chat((QUESTION, call, SECOND, answer)))
