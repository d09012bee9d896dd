"""A text holds what its conversation says, or the row is refused: with TRL's own templates of many families."""

from __future__ import annotations

import importlib.resources

import pytest

from rlhf_ray.data.chat import Chat
from rlhf_ray.data.rendering import Renderer
from rlhf_ray.data.written import check_written
from rlhf_ray.errors import DataError
from rlhf_ray.models.tokenizers import char_tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "weigh_stone",
        "description": "Weight of a \"stone\" in 'grams'",
        "parameters": {
            "type": "object",
            "properties": {
                "stone": {"type": "string", "description": "Its kind: basalt"},
                "scale": {"type": "object", "properties": {"exact": {"type": "boolean", "description": "Slow"}}},
            },
            "required": ["stone"],
        },
    },
}
RULE = {"role": "system", "content": 'Be "brief".\nAlways. é'}
ASK = {"role": "user", "content": " How heavy\nis it? "}
DATA = {"stone": 'a "grey"\nstone ñ', "n": 3, "deep": {"list": [1.5, "zz"]}, "sure": True}
CALL = {"type": "function", "id": "abcdef123", "function": {"name": "weigh_stone", "arguments": DATA}}
OTHER = {"type": "function", "id": "abcdef124", "function": {"name": "weigh_stone", "arguments": {"stone": "chalk"}}}
TOLD = {"role": "tool", "tool_call_id": "abcdef123", "name": "weigh_stone", "content": '12 "g"\nor so'}
SAY = {"role": "assistant", "content": "It is 12 g."}


def calling(*calls, content=""):
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


CHATS = {
    "plain": Chat((ASK, {"role": "assistant", "content": "Heavy. 中文\n"}, ASK, SAY)),
    "system": Chat((RULE, ASK, SAY)),
    "tools": Chat((ASK,), (TOOL,)),
    "call": Chat((ASK, calling(CALL)), (TOOL,)),
    "called": Chat((ASK, calling(CALL, content=None), TOLD, SAY)),
    "spoken call": Chat((ASK, calling(CALL, content="Let me weigh it."), TOLD, SAY), (TOOL,)),
    "two calls": Chat((ASK, calling(CALL, OTHER), TOLD, {**TOLD, "tool_call_id": "abcdef124"}, SAY), (TOOL,)),
    "thought": Chat((ASK, {"role": "assistant", "content": "<think>\nHm\n</think>\n\nHeavy."}, ASK,
                     {"role": "assistant", "content": "<think>\nOf basalt\n</think>\n\nHeavy."})),
    "reasoning": Chat((ASK, {**SAY, "reasoning_content": "Hm"}, ASK, {**SAY, "reasoning_content": "Of basalt"})),
}  # fmt: skip
# What the templates of a family do not write. All else they write, and it must be found. Read in the templates.
DROPPED = {
    "cohere": {"tools", "call", "reasoning"},
    "deepseekv3": {"tools", "call", "spoken call", "two calls", "thought", "reasoning"},
    "gemma": {"tools", "call", "reasoning"},
    "gemma3": {"tools", "call", "reasoning"},
    "glm4moe": set(),
    "gptoss": {"spoken call", "two calls", "reasoning"},  # of several calls it writes one
    "idefics3": {"plain", "system", "tools", "spoken call", "thought", "reasoning"},
    "lfm2": {"call", "called", "spoken call", "two calls", "reasoning"},
    "llama3": {"tools", "call", "called", "spoken call", "two calls", "reasoning"},
    "llama3_1": {"spoken call", "reasoning"},
    "nemotron_3_nano": set(),
    "phi3": {"tools", "call", "called", "spoken call", "two calls", "reasoning"},
    "qwen2_5": {"reasoning"},
    "qwen2_5_vl": {"tools", "call", "called", "spoken call", "two calls", "reasoning"},
    "qwen3": set(),
    "qwen3_5_think": set(),
    "qwen3_6": set(),
    "qwen3_vl": {"reasoning"},
    "gemma4_v5": set(),
}


FOLDER = importlib.resources.files("trl") / "chat_templates"
ALL = sorted(file.name.removesuffix(".jinja") for file in FOLDER.iterdir() if file.name.endswith(".jinja"))


def renderer(name):
    tokenizer = char_tokenizer("ab")
    tokenizer.bos_token = "<bos>"
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return Renderer(tokenizer, {})


@pytest.mark.parametrize("name", DROPPED)
def test_what_trls_templates_drop_is_refused_and_what_they_write_is_found(name):
    render, refused = renderer(name), set()
    for kind, chat in CHATS.items():
        try:
            text, _ = render(chat)
        except DataError:
            continue  # the template itself refuses it
        try:
            check_written(chat, text)
        except DataError as error:
            assert "this chat template drops" in str(error)
            refused.add(kind)
    assert refused == DROPPED[name]


def test_ids_and_details_that_a_template_leaves_out_are_named():
    text, _ = renderer("qwen3")(CHATS["spoken call"])
    assert check_written(CHATS["spoken call"], text) == {"messages[].tool_call_id", "messages[].tool_calls[].id"}
    text, _ = renderer("gptoss")(CHATS["tools"])
    assert check_written(CHATS["tools"], text) == {"tools[].parameters"}, "it writes no descriptions of inner objects"


def test_a_call_is_not_found_in_the_tools_or_the_question():
    """The name stands in the schema and the argument in the question, but nothing stands in the answer."""
    ask = {"role": "user", "content": "weigh_stone for chalk, stone"}
    text = f"[tools]{TOOL}[user]{ask['content']}[assistant][end]"
    with pytest.raises(DataError, match="drops the tool calls of the assistant's message .'weigh_stone'"):
        check_written(Chat((ask, calling(OTHER))), text)
    check_written(Chat((ask, calling(OTHER))), text.replace("[end]", "weigh_stone(stone=chalk)[end]"))


def called(call, reply, said="", answer="Nine stones."):
    """(question, call, reply, answer); the call is a function's name and its argument."""
    function = {"name": call[0], "arguments": {"kind": call[1]}}
    asks = {"role": "assistant", "content": said, "tool_calls": [{**CALL, "function": function}]}
    return Chat((ASK, asks, {**TOLD, "name": call[0], "content": reply}, {**SAY, "content": answer}))


def is_written(render, chat):
    def write(part):
        try:
            return render(part)[0]
        except DataError:
            return None

    try:
        check_written(chat, render(chat)[0], write=write)
    except DataError:
        return False
    return True


@pytest.mark.parametrize("name", ALL)
def test_a_call_is_dropped_or_written_whatever_its_reply_and_the_answer_repeat(name):
    render = renderer(name)
    call = ("weigh_stone", "basalt")
    for said in ("", "Let me weigh it."):
        right = is_written(render, called(call, "12 g", said))
        assert is_written(render, called(call, "basalt", said)) == right, "a reply that is the argument"
        repeated = f'{said} {{"kind": "basalt", "by": "weigh_stone"}}'
        assert is_written(render, called(call, repeated, said)) == right, "a reply with all that was called"
        assert is_written(render, called(call, "12 g", said, repeated)) == right, "an answer with all that was called"
        assert is_written(render, called(call, "12 g", said, "12 g")) == right, "an answer that is the reply"


def test_a_thought_beside_a_call_that_only_the_last_turn_shows_is_named():
    """gpt-oss takes the text beside a call for a thought, and drops it once an answer follows."""
    render, chat = renderer("gptoss"), called(("weigh_stone", "basalt"), "12 g", "Let me weigh it.")
    text, _ = render(chat)
    assert "Let me" not in text and "Let me" in render(chat.with_messages(chat.messages[:2]))[0]
    names = check_written(chat, text, write=lambda part: render(part)[0])
    assert "messages[] thoughts of an answer before the last" in names


def test_a_reply_that_is_dropped_is_not_found_in_its_call():
    def write(chat):
        words = [m["content"] for m in chat.messages if m["role"] != "tool"]
        calls = [c["function"] for m in chat.messages for c in m.get("tool_calls", ())]
        return "|".join(words[:1] + [f"{c['name']}({c['arguments']})" for c in calls] + words[1:])

    chat = called(("weigh_stone", "basalt"), "basalt")
    with pytest.raises(DataError, match="drops the text of the tool's message .'basalt'"):
        check_written(chat, write(chat), write=write)


def test_numbers_and_nested_values_of_arguments_are_looked_for():
    def chat(**arguments):
        function = {"name": "f", "arguments": arguments}
        return Chat((ASK, calling({"type": "function", "function": function})))

    text = ASK["content"] + '[assistant]f({"x": 12, "y": [{"z": "deep"}], "w": true})'
    check_written(chat(x=12, y=[{"z": "deep"}], w=True), text)
    for wrong in ({"x": 13}, {"y": [{"z": "other"}]}, {"v": True}):
        with pytest.raises(DataError, match="drops the tool calls"):
            check_written(chat(**wrong), text)


def test_an_answer_that_repeats_the_question_is_looked_for_behind_it():
    chat = Chat(({"role": "user", "content": "yes"}, {"role": "assistant", "content": "yes"}))
    with pytest.raises(DataError, match="drops the text of the assistant's message .'yes'"):
        check_written(chat, "[user]yes[assistant]")
    assert check_written(chat, "[user]yes[assistant]yes") == set()


def test_a_system_message_may_stand_anywhere():
    chat = Chat((RULE, ASK, SAY))
    assert check_written(chat, f"[user]{ASK['content']}{RULE['content']}[assistant]{SAY['content']}") == set()


@pytest.mark.parametrize("written", [
    '"12 \\"g\\"\\nor so"', '"\\"12 \\\\\\"g\\\\\\"\\\\nor so\\""', "'12 \"g\"\\nor so'"])
def test_escaped_text_is_found(written):
    chat = Chat((ASK, SAY, TOLD))
    begin = ASK["content"] + SAY["content"] + "weigh_stone abcdef123"
    assert check_written(chat, begin + written) == set()
    with pytest.raises(DataError, match="drops the text of the tool's message"):
        check_written(chat, begin + written.replace("g", "kg"))


def test_the_messages_before_may_have_been_found_in_another_text():
    chat = Chat((ASK, {**SAY, "content": "gone"}, ASK, SAY))
    text = ASK["content"] * 2 + SAY["content"]
    with pytest.raises(DataError, match="'gone'"):
        check_written(chat, text)
    assert check_written(chat, text, since=2) == set()


def test_thoughts_that_are_cut_out_of_an_earlier_answer_are_named():
    thought = {"role": "assistant", "content": "One.", "reasoning_content": "secret thought"}
    chat = Chat(({"role": "user", "content": "1?"}, thought, {"role": "user", "content": "2?"},
                 {"role": "assistant", "content": "Two."}))  # fmt: skip
    named = {"messages[] thoughts of an answer before the last"}
    assert check_written(chat, "1? One. 2? Two.") == named
    assert check_written(chat, "1? secret thought One. 2? Two.") == set()
