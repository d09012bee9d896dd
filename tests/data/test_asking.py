"""Prompts whose system message, earlier turns and tools stand in columns of their own."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from rlhf_ray.config.data import ColumnsConfig
from rlhf_ray.data.chat import Chat, Instruction
from rlhf_ray.data.messages import text_of
from rlhf_ray.data.prompts import PromptRows
from rlhf_ray.data.rows import Row
from rlhf_ray.data.types import AnswerRow, ConversationRow, PreferenceRow, PromptRow, TextRow, detect, parse, prompts_in
from rlhf_ray.data.values import EmptyRowError
from rlhf_ray.errors import DataError

RULE = {"role": "system", "content": "Rhyme."}
ASK = {"role": "user", "content": "hi"}
SAY = {"role": "assistant", "content": "yo"}
BAD = {"role": "assistant", "content": "no"}
HH = "\n\nHuman: hi\n\nAssistant:"
TOOL = {"type": "function", "function": {"name": "weigh"}}
ROW = {"role": "user", "content": "older"}, {"role": "assistant", "content": "answer"}


def read(fields, kind=None, **columns):
    row, names, unused = Row(fields, "f.jsonl:7"), ColumnsConfig(**columns), Counter()
    return *parse(row, kind or detect(row, names), names, unused), dict(unused)


@pytest.mark.parametrize(
    ("fields", "record"),
    [
        # tools, in every type that has a prompt
        ({"prompt": [ASK], "tools": [TOOL]}, PromptRow(Chat((ASK,), (TOOL,)))),
        ({"prompt": [ASK], "tools": []}, PromptRow(Chat((ASK,)))),
        ({"prompt": [ASK], "tools": json.dumps([{"name": "weigh"}])}, PromptRow(Chat((ASK,), (TOOL,)))),
        ({"messages": [ASK, SAY], "tools": [TOOL]}, ConversationRow(Chat((ASK, SAY), (TOOL,)))),
        ({"prompt": [ASK], "completion": [SAY], "tools": [TOOL]}, AnswerRow(Chat((ASK,), (TOOL,)), (SAY,))),
        (
            {"prompt": [ASK], "chosen": [SAY], "rejected": [BAD], "tools": [TOOL]},
            PreferenceRow(Chat((ASK,), (TOOL,)), (SAY,), (BAD,)),
        ),
        (
            {"chosen": [ASK, SAY], "rejected": [ASK, BAD], "tools": [TOOL]},
            PreferenceRow(Chat((ASK,), (TOOL,)), (SAY,), (BAD,)),
        ),
        # beside a plain prompt, too, they are for the chat template
        ({"prompt": "hi", "tools": [TOOL]}, PromptRow(Chat((ASK,), (TOOL,)))),
        ({"prompt": "hi", "completion": "yo", "tools": [TOOL]}, AnswerRow(Chat((ASK,), (TOOL,)), (SAY,))),
        (
            {"prompt": [ASK], "chat_template_kwargs": {"enable_thinking": False}},
            PromptRow(Chat((ASK,), (), {"enable_thinking": False})),
        ),
        # system
        ({"prompt": "hi", "system": "Rhyme."}, PromptRow(Chat((RULE, ASK)))),
        ({"prompt": "hi", "system": ""}, PromptRow("hi")),
        ({"question": "hi", "response": "yo", "system_prompt": "Rhyme."}, AnswerRow(Chat((RULE, ASK)), (SAY,))),
        ({"messages": [ASK, SAY], "system": "Rhyme."}, ConversationRow(Chat((RULE, ASK, SAY)))),
        ({"messages": [RULE, ASK, SAY], "system": " Rhyme."}, ConversationRow(Chat((RULE, ASK, SAY)))),
        (
            {"chosen": [ASK, SAY], "rejected": [ASK, BAD], "system": "Rhyme."},
            PreferenceRow(Chat((RULE, ASK)), (SAY,), (BAD,)),
        ),
        (
            {"chosen": f"{HH} yo", "rejected": f"{HH} no", "system": "Rhyme."},
            PreferenceRow(Chat((RULE, ASK)), (SAY,), (BAD,)),
        ),
        # history
        ({"prompt": "hi", "history": [["older", "answer"]]}, PromptRow(Chat((*ROW, ASK)))),
        ({"prompt": "hi", "history": '[["older", "answer"]]'}, PromptRow(Chat((*ROW, ASK)))),
        ({"prompt": [RULE, ASK], "history": list(ROW)}, PromptRow(Chat((RULE, *ROW, ASK)))),
        ({"prompt": "hi", "history": []}, PromptRow("hi")),
        # instructions
        (
            {"instruction": "h", "input": "i", "output": "yo", "system": "Rhyme."},
            AnswerRow(Chat((RULE, {"role": "user", "content": "h\ni"})), (SAY,)),
        ),
        (
            {"instruction": "hi", "input": "", "output": "yo", "history": [["older", "answer"]], "tools": [TOOL]},
            AnswerRow(Chat((*ROW, ASK), (TOOL,)), (SAY,)),
        ),
        ({"instruction": "hi", "context": "there", "response": "yo"}, AnswerRow(Instruction("hi", "there"), "yo")),
        (
            {"instruction": "hi", "input": "there", "chosen": "yo", "rejected": "no"},
            PreferenceRow(Instruction("hi", "there"), "yo", "no"),
        ),
        # other names of the prompt and the answer
        ({"question": "hi", "answer": "yo"}, AnswerRow("hi", "yo")),
        ({"query": "hi", "response": "yo"}, AnswerRow("hi", "yo")),
        ({"system": "Rhyme.", "question": "hi", "chosen": "yo", "rejected": "no"},
         PreferenceRow(Chat((RULE, ASK)), (SAY,), (BAD,))),
        # one message as an answer, after messages
        (
            {"conversations": [{"from": "human", "value": "hi"}], "chosen": {"from": "gpt", "value": "yo"},
             "rejected": {"from": "gpt", "value": "no"}},
            PreferenceRow(Chat((ASK,)), (SAY,), (BAD,)),
        ),
        ({"messages": [ASK], "chosen": SAY, "rejected": BAD}, PreferenceRow(Chat((ASK,)), (SAY,), (BAD,))),
        ({"messages": [ASK], "chosen": "yo", "rejected": "no"}, PreferenceRow(Chat((ASK,)), (SAY,), (BAD,))),
        # an answer that is begun is to be gone on with
        ({"prompt": [ASK, SAY]}, PromptRow(Chat((ASK, SAY)))),
        # labels beside messages
        ({"messages": [ASK, SAY], "label": False}, AnswerRow(Chat((ASK,)), (SAY,), 0)),
        ({"messages": [RULE, ASK, SAY, ASK, BAD], "kto_tag": True}, AnswerRow(Chat((RULE, ASK, SAY, ASK)), (BAD,), 1)),
        ({"prompt": [ASK], "completion": [SAY], "label": 1}, AnswerRow(Chat((ASK,)), (SAY,), 1)),
    ],
)  # fmt: skip
def test_what_a_row_asks(fields, record):
    assert read(fields) == (record, {}), "and every column is used"


def test_a_guessed_name_gives_way_to_what_a_row_says_itself():
    assert read({"text": "a", "question": "b"})[0].text == "a"
    assert read({"messages": [ASK, SAY], "question": "b"}) == (ConversationRow(Chat((ASK, SAY))), {"question": 1})
    record, unused = read({"chosen": f"{HH} yo", "rejected": f"{HH} no", "question": "b"})
    assert record.prompt == HH and unused == {"question": 1}


def test_two_candidates_for_a_name_are_none():
    with pytest.raises(DataError, match="none of the fields"):
        detect(Row({"question": "a", "query": "b"}, "f.jsonl:7"))
    assert detect(Row({"prompt": "a", "answer": "b", "response": "c"}, "f.jsonl:7")) == "prompt"


def test_a_prompt_beside_whole_conversations_is_used_or_named():
    pair = {"chosen": [ASK, SAY], "rejected": [ASK, BAD]}
    assert read({**pair, "prompt": " hi"})[1] == {} == read({**pair, "prompt": [ASK]})[1]
    assert read({**pair, "prompt": "something else"})[1] == {"prompt": 1}
    dialogues = {"chosen": f"{HH} yo", "rejected": f"{HH} no"}
    assert read({**dialogues, "prompt": HH}) == (PreferenceRow(HH, " yo", " no"), {})
    assert read({**dialogues, "prompt": "hi"}) == (PreferenceRow(HH, " yo", " no"), {})
    assert read({**dialogues, "prompt": "ho"}) == (PreferenceRow(HH, " yo", " no"), {"prompt": 1})


@pytest.mark.parametrize("column", ["prompt", "messages"])
@pytest.mark.parametrize(
    ("given", "whole", "asked"),
    [
        ([RULE, ASK], [ASK], [RULE, ASK]),
        ([RULE, *ROW, ASK], [ASK], [RULE, *ROW, ASK]),
        ([ASK], [RULE, ASK], [RULE, ASK]),
        ([ROW[0]], [*ROW, ASK], [*ROW, ASK]),
        ([RULE, ROW[0]], [*ROW, ASK], [RULE, *ROW, ASK]),
        ([{"role": "user", "content": [{"type": "text", "text": "hi "}]}], [ASK], [ASK]),
    ],
)
def test_what_a_prompt_says_beyond_the_conversations_beside_it_is_asked_too(column, given, whole, asked):
    record, unused = read({column: given, "chosen": [*whole, SAY], "rejected": [*whole, BAD]})
    said = [(message["role"], text_of(message).strip()) for message in record.prompt.messages]
    assert said == [(message["role"], message["content"]) for message in asked]
    assert (record.chosen, record.rejected, unused) == ((SAY,), (BAD,), {})


def test_a_conversation_beside_its_pair_is_named_not_asked():
    pair = {"chosen": [ASK, SAY], "rejected": [ASK, BAD]}
    assert read({**pair, "messages": [ASK, SAY]}) == (PreferenceRow(Chat((ASK,)), (SAY,), (BAD,)), {"messages": 1})


def test_a_prompt_beside_one_conversation_is_its_first_message_once_more():
    """As in UltraChat: who learns takes the conversation, who is asked the prompt."""
    row = {"prompt": "hi", "messages": [ASK, SAY, ASK, BAD]}
    whole = ConversationRow(Chat((ASK, SAY, ASK, BAD)))
    assert read(row) == (whole, {}) == read({**row, "prompt": [ASK]})
    assert read({**row, "prompt": "ho"}) == (whole, {"prompt": 1})
    assert read({**row, "label": True}) == (AnswerRow(Chat((ASK, SAY, ASK)), (BAD,), 1), {})
    for more in ({}, {"label": True}):
        fields = {**row, **more}
        ((prompt, columns),) = PromptRows(None).asked(Row(fields, "f.jsonl:7"))
        assert prompt == "hi" and columns == {name: value for name, value in fields.items() if name != "prompt"}
    ((prompt, _),) = PromptRows(None).asked(Row({"messages": row["messages"]}, "f.jsonl:7"))
    assert prompt == Chat((ASK, SAY, ASK))


@pytest.mark.parametrize(
    ("fields", "columns", "record"),
    [
        ({"history": "q", "a": "yo", "b": "no"}, {"prompt": "history", "chosen": "a", "rejected": "b"},
         PreferenceRow("q", "yo", "no")),
        ({"instruction": "q", "answer": "yo"}, {"prompt": "instruction"}, AnswerRow("q", "yo")),
        ({"prompt": "a text"}, {"text": "prompt"}, TextRow("a text")),
        ({"tools": "q", "completion": "yo"}, {"prompt": "tools"}, AnswerRow("q", "yo")),
        ({"instruction": "q", "response": "rules", "output": "yo"}, {"system": "response"},
         AnswerRow(Chat((RULE, {**ASK, "content": "q"})), (SAY,))),
    ],
)  # fmt: skip
def test_a_column_has_one_role(fields, columns, record):
    fields = {name: "Rhyme." if value == "rules" else value for name, value in fields.items()}
    assert read(fields, **columns) == (record, {})


def test_a_system_message_that_is_said_twice_stands_once():
    twice = {"prompt": "hi", "system": "Rhyme. ", "history": [RULE, *ROW]}
    assert read(twice) == (PromptRow(Chat((RULE, *ROW, ASK))), {})
    assert read({**twice, "prompt": [RULE, ASK], "system": None}) == (PromptRow(Chat((RULE, *ROW, ASK))), {})


def cells(fields):
    """As a CSV file has them."""
    return {name: json.dumps(value, ensure_ascii=False) for name, value in fields.items()}


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [RULE, ASK]},
        {"prompt": [ASK], "completion": [SAY]},
        {"chosen": [ASK, SAY], "rejected": [ASK, BAD]},
        {"prompt": [ASK], "chosen": SAY, "rejected": BAD},
        {"prompt": [{"from": "human", "value": "hi"}], "completions": [[SAY], [BAD]]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}], "tools": [TOOL]},
    ],
)
def test_messages_in_a_cell_are_messages(fields):
    assert read(cells(fields)) == read(fields)
    row = Row(cells(fields), "f.csv:7")
    assert prompts_in(row, detect(row)) == prompts_in(Row(fields, "f.csv:7"), detect(row))


@pytest.mark.parametrize(
    "answer",
    [
        '[{"from": "Oslo", "to": "Bergen"}]', '{"role": "admin", "name": "Bo"}', "[]", "[1, 2]", "{}", "[1] says so",
        '[{"role": "user", "content": "hi"}, {"fare": 3}]', "{'from': 'Oslo', 'to': 'Bergen'}", '[{"role": "user"',
    ],
)  # fmt: skip
def test_an_answer_that_is_json_of_another_kind_stays_text(answer):
    assert read({"prompt": "hi", "completion": answer}) == (AnswerRow("hi", answer), {})


def test_messages_as_python_prints_them_are_refused():
    for printed in (str([ASK, SAY]), str(SAY), "[{'content': 'hi', 'role': 'user'}\n {'content': 'yo', 'role': 'x'}]"):
        with pytest.raises(DataError, match=r"^f\.jsonl:7: field 'completion' holds messages as Python prints them"):
            read({"prompt": "hi", "completion": printed})
    with pytest.raises(DataError, match="field 'messages' holds messages as Python prints them"):
        read({"messages": str([ASK, SAY])})


def test_what_nothing_reads_is_named():
    fields = {"messages": [{**ASK, "id": 1}, {**SAY, "id": 2}], "source": "x", "score": None, "tags": [], "note": " "}
    assert read(fields)[1] == {"source": 1, "messages[].id": 1}, "rows are counted, not messages"
    task = {"instruction": "a", "instances": [{"input": "", "output": "b", "mark": 1}, {"input": "x", "output": "c"}]}
    assert read({**task, "id": "seed"})[-1] == {"id": 1, "instances[].mark": 1}


def test_a_policy_is_asked_without_reading_the_answers():
    def ask(fields):
        row, unused = Row(fields, "f.jsonl:7"), Counter()
        return *prompts_in(row, detect(row), unused=unused), dict(unused)

    assert ask({"instruction": "hi", "output": 4, "system": "Rhyme."}) == (Chat((RULE, ASK)), {})
    assert ask({"question": "hi", "answer": 4}) == ("hi", {})
    assert ask({"prompt": "hi", "completions": 4}) == ("hi", {})
    assert ask({"text": "hi", "label": "positive"}) == ("hi", {})
    assert ask({"messages": [ASK, SAY], "label": "good"}) == (Chat((ASK,)), {})
    weighed = [ASK, {**SAY, "weight": 0}, ASK]
    assert ask({"messages": weighed}) == (Chat(tuple(weighed)), {"messages[].weight": 1})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"messages": [RULE, ASK], "system": "Sing."}, "'system' and the conversation have two different system"),
        ({"prompt": "a", "system": "Rhyme.", "history": [{**RULE, "content": "Sing."}, *ROW]},
         "'system' and field 'history' have two different system messages"),
        ({"prompt": [RULE, ASK], "history": [{**RULE, "content": "Sing."}, *ROW]},
         "'history' and the conversation have two different system messages"),
        ({"prompt": [RULE, BAD], "chosen": [ASK, SAY], "rejected": [ASK, BAD]}, "'prompt' and the beginning that"),
        ({"prompt": [RULE, ASK], "chosen": [{**RULE, "content": "Sing."}, ASK, SAY],
          "rejected": [{**RULE, "content": "Sing."}, ASK, BAD]}, "'prompt' and the beginning that"),

        ({"prompt": "a", "system": 3}, "field 'system' is of type int, not text"),
        ({"prompt": "a", "history": [["b"]]}, r"field 'history' holds \['b'\], which is no pair of texts"),
        ({"prompt": "a", "history": "b"}, "field 'history' holds 'b', which is no pair"),
        ({"prompt": "a", "history": [["b", 3]]}, "no pair of texts"),
        ({"prompt": "a", "tools": "weigh"}, "field 'tools' is no JSON"),
        ({"prompt": "a", "tools": [3]}, "field 'tools' holds a tool that is 3"),
        ({"prompt": "a", "chat_template_kwargs": [1]}, r"field 'chat_template_kwargs' is \[1\], not an object"),
        ({"messages": [ASK, SAY, ASK], "label": 1}, "does not end with the answer that is labelled"),
        ({"messages": [ASK, {**SAY, "weight": 0}], "label": 1}, "an answer of weight 0"),
        ({"prompt": [ASK], "chosen": [{**SAY, "weight": 0}], "rejected": [BAD]}, "'chosen' holds an answer of weight"),
        ({"chosen": "yo", "rejected": {"role": "user", "content": "x"}}, "one of 'chosen' and 'rejected' is text"),
    ],
)  # fmt: skip
def test_a_context_that_is_wrong_says_where_and_what(fields, says):
    with pytest.raises(DataError, match=rf"^f\.jsonl:7: .*{says}") as caught:
        read(fields)
    assert not isinstance(caught.value, EmptyRowError)
