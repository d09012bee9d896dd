from __future__ import annotations

import json
import re
from typing import get_args

import pytest

from rlhf_ray.config.data import ColumnsConfig, DataType
from rlhf_ray.data.chat import Chat, Instruction
from rlhf_ray.data.rows import Row
from rlhf_ray.data.types import (
    AnswerRow,
    ConversationRow,
    PreferenceRow,
    PromptRow,
    RankedRow,
    TextRow,
    detect,
    parse,
    prompt_of,
)
from rlhf_ray.data.values import EmptyRowError
from rlhf_ray.errors import DataError

ASK = {"role": "user", "content": "hi"}
SAY = {"role": "assistant", "content": "yo"}
BAD = {"role": "assistant", "content": "no"}
HH = "\n\nHuman: hi\n\nAssistant:"


def row(fields):
    return Row(fields, "f.jsonl:7")


def read(fields, kind=None, **columns):
    names = ColumnsConfig(**columns)
    return parse(row(fields), kind or detect(row(fields), names), names)


@pytest.mark.parametrize(
    ("fields", "kind", "record"),
    [
        ({"prompt": "a"}, "prompt", PromptRow("a")),
        ({"prompt": [ASK]}, "prompt", PromptRow(Chat((ASK,)))),
        ({"prompt": "a", "completion": "b"}, "prompt_completion", AnswerRow("a", "b")),
        ({"prompt": [ASK], "completion": [SAY]}, "prompt_completion", AnswerRow(Chat((ASK,)), (SAY,))),
        ({"prompt": [ASK], "completion": "yo"}, "prompt_completion", AnswerRow(Chat((ASK,)), (SAY,))),
        ({"prompt": "hi", "completion": [SAY]}, "prompt_completion", AnswerRow(Chat((ASK,)), (SAY,))),
        ({"prompt": "a", "completion": "b", "label": True}, "unpaired", AnswerRow("a", "b", 1)),
        ({"prompt": "a", "completion": "b", "label": None}, "prompt_completion", AnswerRow("a", "b")),
        ({"text": "a"}, "text", TextRow("a")),
        ({"text": "a", "label": 2}, "labelled", TextRow("a", 2)),
        ({"text": "a", "label": "true"}, "labelled", TextRow("a", 1)),
        ({"messages": [ASK, SAY]}, "messages", ConversationRow(Chat((ASK, SAY)))),
        ({"messages": '[{"role": "user", "content": "hi"}]'}, "messages", ConversationRow(Chat((ASK,)))),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
            "messages",
            ConversationRow(Chat((ASK, SAY))),
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference", PreferenceRow("a", "b", "c")),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "0.5"},
            "preference",
            PreferenceRow("a", "b", "c", 0.5),
        ),
        ({"chosen": HH + " yo", "rejected": HH + " no"}, "preference", PreferenceRow(HH, " yo", " no")),
        ({"chosen": [ASK, SAY], "rejected": [ASK, BAD]}, "preference", PreferenceRow(Chat((ASK,)), (SAY,), (BAD,))),
        (
            {"prompt": "hi", "chosen": [ASK, SAY], "rejected": [ASK, BAD]},
            "preference",
            PreferenceRow(Chat((ASK,)), (SAY,), (BAD,)),
        ),
        (
            {"prompt": [ASK], "chosen": [SAY], "rejected": [BAD]},
            "preference",
            PreferenceRow(Chat((ASK,)), (SAY,), (BAD,)),
        ),
        ({"prompt": "a", "completions": ["b", "c", "d"]}, "ranked", RankedRow("a", ("b", "c", "d"))),
        (
            {"prompt": "a", "completions": ["b", "c", "d"], "scores": [1, 3, 1]},
            "ranked",
            RankedRow("a", ("c", "b", "d"), (3.0, 1.0, 1.0)),
        ),
        ({"instruction": "a", "input": "", "output": "b"}, "instruction", AnswerRow(Instruction("a"), "b")),
        ({"instruction": "a", "input": "x", "output": "b"}, "instruction", AnswerRow(Instruction("a", "x"), "b")),
        ({"instruction": "a", "input": "x"}, "instruction", PromptRow(Instruction("a", "x"))),
        (
            {"data_source": "d", "prompt": [ASK], "ability": "m", "reward_model": {"ground_truth": "4"}},
            "verl",
            PromptRow(Chat((ASK,))),
        ),
    ],
)
def test_each_type_is_recognised_and_read(fields, kind, record):
    assert detect(row(fields)) == kind
    assert read(fields) == (record,)


def test_the_examples_in_the_documentation_are_what_it_says(repo_root):
    types, kind = set(), None
    for line in (repo_root / "docs" / "data.md").read_text().splitlines():
        if found := re.match(r"\| (?:`(\w+)`|the same, [\w ]+) \| `(\{.*?\})`[ ,;|]", line):
            kind = found[1] or kind
            types.add(kind)
            fields = json.loads(found[2])
            assert detect(row(fields)) == kind and read(fields), line
    assert types == set(get_args(DataType))


def test_an_instruction_with_several_instances_makes_as_many_records():
    fields = {"instruction": "a", "instances": [{"input": "", "output": "b"}, {"input": "x", "output": "c"}]}
    assert read(fields) == (AnswerRow(Instruction("a"), "b"), AnswerRow(Instruction("a", "x"), "c"))


def test_columns_may_have_names_of_their_own():
    fields = {"puzzle": "a", "solution": "b"}
    assert read(fields, prompt="puzzle", completion="solution") == (AnswerRow("a", "b"),)
    with pytest.raises(DataError, match=r"f\.jsonl:7: none of the fields .*'puzzle', 'solution'.*data\.columns"):
        detect(row(fields))


def test_the_prompt_of_each_record():
    assert prompt_of(ConversationRow(Chat((ASK, SAY)))) == Chat((ASK,))
    assert prompt_of(ConversationRow(Chat((ASK, SAY, ASK)))) == Chat((ASK, SAY, ASK))
    assert prompt_of(TextRow("a", 1)) == "a"
    assert prompt_of(PreferenceRow("a", "b", "c")) == "a"


@pytest.mark.parametrize(
    ("fields", "kind", "says"),
    [
        ({"prompt": "a"}, "prompt_completion", "no field 'completion'; the row has 'prompt'"),
        ({"prompt": "a", "completion": 3}, None, "field 'completion' is of type int, not text"),
        ({"text": "a", "label": "good"}, None, "field 'label' is 'good'; a label is true, false, or a class 0, 1"),
        ({"text": "a", "label": -1}, None, "field 'label' is -1"),
        ({"prompt": "a", "completion": "b", "label": 2}, None, "an unpaired preference is true or false"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "x"}, None, "field 'margin' has 'x', not a finite"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("nan")}, None, "has nan, not a finite number"),
        ({"chosen": "one", "rejected": "two"}, None, "share no beginning, so there is no prompt"),
        ({"chosen": [ASK, SAY], "rejected": "no"}, None, "one of 'chosen' and 'rejected' is text, the other messages"),
        ({"chosen": [SAY], "rejected": [BAD]}, None, "no field 'prompt'"),
        ({"chosen": [ASK, SAY], "rejected": [SAY, BAD]}, None, "no field 'prompt'"),
        ({"chosen": [ASK, SAY], "rejected": [{**ASK, "content": "x"}, BAD]}, None, "differ in their first message"),
        ({"chosen": [ASK, ASK], "rejected": [ASK, BAD]}, None, "from message 2 on, which is not the assistant's"),
        ({"prompt": [ASK], "chosen": [ASK], "rejected": [SAY]}, None, "does not begin with an assistant's message"),
        ({"prompt": "a", "completions": ["b"]}, None, "has 1 answers; a ranking needs two"),
        ({"prompt": "a", "completions": "b"}, None, "of type str, not a list"),
        ({"prompt": "a", "completions": ["b", "c"], "scores": [1]}, None, "2 completions but 1 scores"),
        ({"prompt": "a", "completions": ["b", [SAY]]}, None, "mixes texts and messages"),
        ({"instruction": "a", "instances": ["b"]}, None, "field 'instances' is no list of objects"),
        ({"data_source": "d", "prompt": [ASK], "reward_model": "x"}, None, "no object with a 'ground_truth'"),
        ({"messages": [SAY]}, None, "an answer but no question"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, None, "a part of type 'image'"),
        ({"messages": [{"role": "user", "content": 3}]}, None, "without content that is text"),
        ({"messages": "hello"}, None, "of type str, not a list of messages"),
        ({"text": "half \ud800"}, None, r"half of a character .position 5."),
    ],
)
def test_a_bad_row_says_where_and_what(fields, kind, says):
    with pytest.raises(DataError, match=rf"^f\.jsonl:7: .*{says}") as caught:
        read(fields, kind)
    assert not isinstance(caught.value, EmptyRowError), "cleaning would leave it out in silence"


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": " "},
        {"prompt": "a", "completion": ""},
        {"messages": []},
        {"messages": [ASK, {"role": "assistant", "content": "  "}]},
        {"chosen": HH + " yo", "rejected": HH},
        {"instruction": "a", "instances": []},
        {"instruction": "a", "input": "x", "output": "\n"},
    ],
)
def test_an_empty_row_is_told_from_a_wrong_one(fields):
    with pytest.raises(EmptyRowError, match=r"^f\.jsonl:7: .*; remove the row, or fill it"):
        read(fields)


def test_a_message_may_call_a_tool_instead_of_speaking():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    (record,) = read({"messages": [ASK, call]})
    function = {"type": "function", "function": {"name": "f", "arguments": {}}}
    assert record.chat.messages[1] == {"role": "assistant", "content": None, "tool_calls": [function]}
