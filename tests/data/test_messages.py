"""Every key of a message is used, named or refused."""

from __future__ import annotations

from collections import Counter

import pytest

from rlhf_ray.data.messages import read_message, read_messages, readable, text_of
from rlhf_ray.data.values import EmptyRowError
from rlhf_ray.errors import DataError

CALL = {"type": "function", "function": {"name": "weigh", "arguments": {"stone": "basalt"}}}


def read(message):
    unused = Counter()
    return read_message(message, unused), dict(unused)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"role": "user", "content": "Hi", "name": None, "tool_calls": None}, {"role": "user", "content": "Hi"}),
        ({"role": "assistant", "content": "Hi", "tool_calls": []}, {"role": "assistant", "content": "Hi"}),
        (
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
        ),
        ({"role": "assistant", "tool_calls": [CALL]}, {"role": "assistant", "content": None, "tool_calls": [CALL]}),
        (
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
        ),
        (
            {"role": "assistant", "function_call": {"name": "weigh", "arguments": '{"stone": "basalt"}'}},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
        ),
        (
            {"role": "tool", "content": "", "tool_call_id": "c1", "name": "weigh"},
            {"role": "tool", "content": "", "tool_call_id": "c1", "name": "weigh"},
        ),
        ({"role": "function", "name": "weigh", "content": "3"}, {"role": "tool", "content": "3", "name": "weigh"}),
        (
            {"role": "assistant", "content": "Hi", "reasoning_content": "greet", "weight": 0.0},
            {"role": "assistant", "content": "Hi", "reasoning_content": "greet", "weight": 0},
        ),
        ({"role": "user", "content": "Hi", "weight": 0}, {"role": "user", "content": "Hi", "weight": 0}),
        (
            {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i", "image": None}]},
            {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
        ),
        ({"role": "user", "content": "Hi", "images": []}, {"role": "user", "content": "Hi"}),
        ({"from": "human", "value": "Hi"}, {"role": "user", "content": "Hi"}),
        ({"role": "human", "content": "Hi"}, {"role": "user", "content": "Hi"}),
        ({"role": "gpt", "content": "Hi"}, {"role": "assistant", "content": "Hi"}),
        ({"role": "Assistant", "content": "Hi", "weight": 1}, {"role": "assistant", "content": "Hi", "weight": 1}),
        ({"role": "critic", "content": "Hi"}, {"role": "critic", "content": "Hi"}),
        ({"from": "gpt", "value": "Hi", "weight": 1}, {"role": "assistant", "content": "Hi", "weight": 1}),
        ({"from": "observation", "value": "3"}, {"role": "tool", "content": "3"}),
        (
            {"from": "function_call", "value": '{"name": "weigh", "arguments": {"stone": "basalt"}}'},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
        ),
    ],
)
def test_what_is_used(given, message):
    assert read(given) == (message, {})


def test_what_has_no_use_is_counted_by_name():
    part = {"type": "text", "text": "Hi", "cache_control": {}}
    _, unused = read({"role": "user", "content": [part], "timestamp": 3, "id": "m1", "draft": None})
    assert unused == {"messages[].timestamp": 1, "messages[].id": 1, "messages[].content[].cache_control": 1}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"role": "user", "content": "Hi", "images": ["a.png"]}, "'images', and only text is read"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "a part of type 'image_url'"),
        ({"role": "user", "content": [{"type": "text", "text": "Hi", "audio": "x"}]}, "a part with 'audio'"),
        ({"role": "user", "content": [{"type": "text"}]}, "without content that is text"),
        ({"role": "user", "content": ["Hi"]}, "a part 'Hi' of a message"),
        ({"role": "user", "content": {"text": "Hi"}}, "without content that is text"),
        ({"role": "user", "content": None}, "without content that is text"),
        ({"role": "user", "content": "Hi", "tool_calls": [CALL]}, "'user' with tool calls"),
        ({"role": "user", "content": "Hi", "weight": 1}, "'user' with the weight 1; a weight is 0 or 1"),
        ({"role": "assistant", "content": "Hi", "weight": 0.5}, "'assistant' with the weight 0.5"),
        ({"role": "assistant", "content": "Hi", "weight": "1"}, "with the weight '1'"),
        ({"role": "assistant", "content": "Hi", "thinking": True}, "'thinking' is True, not text"),
        ({"role": "assistant", "content": "Hi", "thinking": "a", "reasoning": "b"}, "'thinking' and 'reasoning'"),
        ({"role": "assistant", "content": "a", "tool_calls": [CALL], "function_call": CALL}, "both 'tool_calls' and"),
        ({"role": "user", "content": "\udfff"}, "half of a character"),
        ({"role": "\udfff", "content": "Hi"}, "half of a character"),
        ({"role": 3, "content": "Hi"}, "a message without a role"),
        ({"from": "bing", "value": "Hi"}, "a message from 'bing'; ShareGPT's speakers are system, human"),
        ({"from": ["human"], "value": "Hi"}, "a message from"),
        ({"from": "human", "text": "Hi"}, "a message from 'human' without a value"),
        ({"from": "function_call", "value": "weigh it"}, "is no JSON"),
        (3, "holds 3, which is no message"),
    ],
)
def test_what_is_refused(given, says):
    with pytest.raises(DataError, match=says) as caught:
        read(given)
    assert not isinstance(caught.value, EmptyRowError)


@pytest.mark.parametrize(
    "given", [{"role": "user", "content": ""}, {"role": "user", "content": [{"type": "text", "text": "\n"}]}]
)
def test_a_message_that_says_nothing(given):
    with pytest.raises(EmptyRowError):
        read(given)
    with pytest.raises(EmptyRowError):
        read_messages([], Counter())


def test_what_people_read_of_a_message():
    assert readable({"role": "assistant", "content": None, "tool_calls": [CALL]}) == 'weigh({"stone": "basalt"})'
    both = {"role": "assistant", "content": "See:", "tool_calls": [CALL]}
    assert readable(both) == 'See:\nweigh({"stone": "basalt"})'
    assert text_of({"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}) == "Hi"
