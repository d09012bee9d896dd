"""What reaches a chat template, and that its text is that of `apply_chat_template`."""

from __future__ import annotations

import pytest

from rlhf_ray.data.chat import Chat
from rlhf_ray.data.encoding import Encoder
from rlhf_ray.data.rendering import Renderer, common_length
from rlhf_ray.data.templates import CHAT_TEMPLATES
from rlhf_ray.errors import DataError
from rlhf_ray.models.tokenizers import bpe_tokenizer

ASK = {"role": "user", "content": "How deep is it?"}
TOOL = {"type": "function", "function": {"name": "sound_depth", "parameters": {"type": "object", "properties": {}}}}
# Each writes tools and calls in one way that templates do.
HEAD = "{% if tools %}{{ tools | tojson }}{% endif %}"
CALLS = (
    HEAD + "{% for m in messages %}[{{ m.role }}]{% if m.content is none %}null{% else %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}(ARGUMENTS){% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
OBJECTS = CALLS.replace("ARGUMENTS", "{{ c.function.arguments | tojson }}")


@pytest.fixture
def tokenizer():
    return bpe_tokenizer(["abc"], vocab_size=258)


def call(arguments, content=""):
    function = {"name": "sound_depth", "arguments": arguments}
    return {"role": "assistant", "content": content, "tool_calls": [{"type": "function", "function": function}]}


def written(tokenizer, template, *messages, tools=()):
    tokenizer.chat_template = template
    return Renderer(tokenizer, {})(Chat(messages, tools))[0]


def test_tools_stand_in_prompts_answers_and_conversations(tokenizer):
    tokenizer.chat_template = OBJECTS
    encoder = Encoder(tokenizer)
    chat = Chat((ASK, call({"at": "bow"})), (TOOL,))
    own = tokenizer.apply_chat_template([ASK], tools=[TOOL], tokenize=False, add_generation_prompt=True)
    assert '"sound_depth"' in own
    assert encoder.prompt(chat.with_messages((ASK,)))[0] == own
    whole = tokenizer.apply_chat_template(list(chat.messages), tools=[TOOL], tokenize=False)
    (conversation,) = encoder.conversation(chat)
    answer = encoder.answer(chat.with_messages((ASK,)), (call({"at": "bow"}),))
    assert tokenizer.decode(conversation.token_ids) == tokenizer.decode(answer.token_ids) == whole


@pytest.mark.parametrize(("how", "right"), [
    ("{{ c.function.arguments | tojson }}", '{"at": "bow"}'),
    ("{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}", "at=bow"),
    ("{{ '' + c.function.arguments }}", '{"at": "bow"}'),  # fails with an object
    ("{{ c.function.arguments }}", '{"at": "bow"}'),  # would write Python's single quotes
])  # fmt: skip
def test_arguments_are_an_object_or_json_text_as_the_template_wants_them(tokenizer, how, right):
    template = CALLS.replace("ARGUMENTS", how)
    assert written(tokenizer, template, ASK, call({"at": "bow"})).endswith(f"[assistant]sound_depth({right})<eos>")


def test_null_content_reaches_the_template_unless_it_would_write_none(tokenizer):
    assert "[assistant]nullsound_depth" in written(tokenizer, OBJECTS, ASK, call({}, None))
    careless = OBJECTS.replace("{% if m.content is none %}null{% else %}{{ m.content }}{% endif %}", "{{ m.content }}")
    assert "[assistant]sound_depth" in written(tokenizer, careless, ASK, call({}, None))
    strict = careless.replace("{{ m.content }}", "{{ m.content.strip() }}")
    assert "[assistant]sound_depth" in written(tokenizer, strict, ASK, call({}, None))


def test_parts_are_joined_for_a_template_that_reads_text_only(tokenizer):
    parts = {"role": "user", "content": [{"type": "text", "text": "How "}, {"type": "text", "text": "deep?"}]}
    assert written(tokenizer, OBJECTS, parts) == "[user]How deep?<eos>"
    picky = OBJECTS.replace("{{ m.content }}", "{{ m.content if m.content is string }}")
    assert written(tokenizer, picky, parts) == "[user]How deep?<eos>", "not dropped"
    reads = OBJECTS.replace("{{ m.content }}", "{% for p in m.content %}<{{ p.text }}>{% endfor %}")
    assert written(tokenizer, reads, parts) == "[user]<How ><deep?><eos>"
    image = {"role": "user", "content": [{"type": "image"}]}
    with pytest.raises(DataError, match="reads text only, and a message holds a part that is none"):
        written(tokenizer, OBJECTS, image)


def test_a_rows_own_variables_go_before_those_of_the_settings(tokenizer):
    tokenizer.chat_template = "{{ mood }}{{ size }}{{ messages[0].content }}"
    render = Renderer(tokenizer, {"mood": "calm", "size": "big"})
    assert render(Chat((ASK,), template_args={"mood": "wild"}))[0] == "wildbigHow deep is it?"


def test_an_answer_of_weight_0_is_read_but_not_learned_and_the_template_never_sees_the_key(tokenizer):
    template = CHAT_TEMPLATES["zephyr"]
    tokenizer.chat_template = template.replace("{{- message[", "{{- message.weight }}{{- message[")
    said = [{"role": "assistant", "content": text, "weight": weight} for text, weight in (("Nine.", 0), ("Six.", 1))]
    chat = Chat((ASK, said[0], ASK, said[1]))
    for learn in ("all", "last"):
        (example,) = Encoder(tokenizer, learn=learn).conversation(chat)
        learned = [t for t, is_learned in zip(example.token_ids, example.learned, strict=True) if is_learned]
        assert tokenizer.decode(learned) == "Six.<eos>"
        assert "assistant|>\nNine.<eos>" in tokenizer.decode(example.token_ids)
    with pytest.raises(DataError, match="every answer of the assistant has weight 0"):
        Encoder(tokenizer).conversation(chat.with_messages(chat.messages[:2]))
    with pytest.raises(DataError, match="weight 0.5; it is 1 .learn this answer. or 0"):
        Encoder(tokenizer).conversation(chat.with_messages((ASK, {**said[0], "weight": 0.5})))


def test_an_unfinished_answer_is_gone_on_with(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATES["zephyr"]
    begun = {"role": "assistant", "content": "It is "}
    own = tokenizer.apply_chat_template([ASK, begun], tokenize=False, continue_final_message=True)
    assert Encoder(tokenizer).prompt(Chat((ASK, begun)))[0] == own
    assert own.endswith("<|assistant|>\nIt is ")


@pytest.mark.parametrize(("one", "other", "right"), [
    ("", "a", 0), ("abc", "abc", 3), ("abc", "abd", 2), ("ab", "abab", 2), ("xbc", "abc", 0), ("aXa", "aYa", 1)])
def test_how_far_two_texts_are_alike(one, other, right):
    assert common_length(one, other) == common_length(other, one) == right
