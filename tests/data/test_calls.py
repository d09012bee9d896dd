"""Tool calls and tools: every form that people write, in the one form that templates read."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from rlhf_ray.data.calls import calls_of, tools_of
from rlhf_ray.errors import DataError

WEIGH = {"name": "weigh", "arguments": {"stone": "basalt", "grams": True}}
CALL = {"type": "function", "function": WEIGH}
SCHEMA = {"name": "weigh", "description": "Weight of a stone", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": SCHEMA}


@pytest.mark.parametrize(
    "given",
    [
        [CALL],
        [WEIGH],
        WEIGH,
        [{"function": WEIGH}],
        [{"function": {**WEIGH, "arguments": json.dumps(WEIGH["arguments"])}}],
        [{"name": "weigh", "parameters": WEIGH["arguments"]}],
        json.dumps(WEIGH),
        json.dumps([CALL]),
        [json.dumps(CALL)],
    ],
)
def test_a_call_has_one_form(given):
    assert calls_of(given) == [CALL]


def test_ids_stay_and_so_do_nulls_that_somebody_wrote():
    (call,) = calls_of([{"id": "c1", "name": "weigh", "arguments": '{"stone": null}'}])
    assert call == {"type": "function", "id": "c1", "function": {"name": "weigh", "arguments": {"stone": None}}}


def test_nulls_that_a_table_pads_with_are_taken_away_and_counted():
    unused = Counter()
    padded = {"name": "weigh", "arguments": {"stone": "basalt", "grams": None, "at": {"town": None, "lab": 3}}}
    (call,) = calls_of([padded], unused)
    assert call["function"]["arguments"] == {"stone": "basalt", "at": {"lab": 3}}
    (tool,) = tools_of([{**SCHEMA, "strict": None}], unused)
    assert tool == TOOL
    assert unused == {"messages[].tool_calls[] keys that are null": 1, "tools[] keys that are null": 1}
    unused.clear()
    for text in (json.dumps(padded), json.dumps([padded]), [json.dumps(padded)]):
        assert calls_of(text, unused)[0]["function"]["arguments"] == padded["arguments"]
    assert not unused, "in JSON text somebody meant them"


@pytest.mark.parametrize("nothing", [{}, None, "", " "])
def test_a_call_without_arguments_has_an_empty_object(nothing):
    assert calls_of([{"name": "weigh", "arguments": nothing}])[0]["function"]["arguments"] == {}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([{"name": "weigh", "arguments": "{stone"}], "a call of 'weigh' whose arguments are wrong: is no JSON"),
        ([{"name": "weigh", "arguments": "[1]"}], r"whose arguments are \[1\], not an object"),
        ([{"name": "weigh", "arguments": 3}], "whose arguments are 3, not an object"),
        ([{"name": "weigh", "arguments": '{"x": NaN}'}], "holds NaN, which is no JSON"),
        ([{"name": "weigh", "arguments": {"x": float("inf")}}], "holds inf .type float., which JSON cannot say"),
        ([{"name": "weigh", "arguments": {"x": b"1"}}], "type bytes"),
        ([{"name": "weigh", "arguments": {"x": "\ud800"}}], "half of a character"),
        ([{"name": "weigh", "arguments": '{"x": ' + "9" * 5000 + "}"}], "is no JSON"),
        ([{"name": "weigh", "arguments": "[" * 100000}], "nested too deeply"),
        ([{"arguments": {}}], "a tool call without a function's name"),
        ([{"type": "function", "id": "c1"}], "a tool call without a function's name"),
        ([{"function": "weigh"}], "a tool call whose function is 'weigh', not an object"),
        ([3], "a tool call that is 3, not an object"),
        (3, "tool calls that are 3, not a list"),
        ("weigh(basalt)", "is no JSON .'weigh.basalt.'."),
    ],
)
def test_a_call_that_is_none_is_refused(given, says):
    with pytest.raises(DataError, match=says):
        calls_of(given)


def test_nesting_has_an_end():
    deep: dict = {}
    for _ in range(500):
        deep = {"x": deep}
    with pytest.raises(DataError, match="nested more than 32 levels deep"):
        calls_of([{"name": "weigh", "arguments": deep}])


@pytest.mark.parametrize("given", [[TOOL], [SCHEMA], SCHEMA, json.dumps([SCHEMA]), [json.dumps(TOOL)]])
def test_a_tool_has_one_form(given):
    assert tools_of(given) == (TOOL,)


def test_a_tool_that_is_built_into_a_model_stays_as_it_is():
    assert tools_of([{"type": "web_search"}]) == ({"type": "web_search"},)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([{"description": "no name"}], "a tool without a function's name"),
        ("weigh", "is no JSON"),
        (7, "is 7, not a list of tools"),
        ([[SCHEMA]], "a tool that is .*, not an object"),
    ],
)
def test_a_tool_that_is_none_is_refused(given, says):
    with pytest.raises(DataError, match=says):
        tools_of(given)
