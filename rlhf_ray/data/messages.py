"""Messages of a row in the one form that chat templates read: OpenAI's keys, from OpenAI's and ShareGPT's words.

Every key of a message is used, counted as unused by its name, or refused. Complaints name no place: the row's reader
(data/columns.py) adds file and line.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rlhf_ray.data.calls import calls_of
from rlhf_ray.data.chat import Message, Messages
from rlhf_ray.data.values import EmptyRowError, check_text, from_json, says_something, shown
from rlhf_ray.errors import DataError

EXAMPLE = 'write a list like [{"role": "user", "content": "Hello"}]'
# The names under which templates look for what a model thought before it spoke; a row keeps the one that it has.
REASONING = ("reasoning_content", "thinking", "reasoning")
_MEDIA = {"audio", "audios", "file", "files", "image", "image_url", "images", "input_audio", "video", "videos"}
# Words of other tools that stand under `role` too; OpenAI's own in capitals.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant",
          **{role: role for role in ("system", "user", "assistant", "tool")}}  # fmt: skip
_SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "function_call": "assistant", "observation": "tool", "tool": "tool",
    "function_response": "tool",
}  # fmt: skip
# How Python prints messages, which is what pandas writes into a cell.
_PRINTED = re.compile(r"\s*\[?\s*\{'(?:role|from|content|value)': ")
_SPEAKS = (("role", ("content", "tool_calls", "function_call")), ("from", ("value",)))


def messages_in_text(text: str) -> list[Any] | Mapping[str, Any] | None:
    """The messages, or the one message, whose JSON text this is, as cells of CSV files have them; None: it is a text.

    An answer may well be JSON. It is taken for messages only where every object says who speaks and what.
    Raises DataError for messages as Python prints them.
    """
    if _PRINTED.match(text) and any(f"'{who}': " in text and f"'{what[0]}': " in text for who, what in _SPEAKS):
        raise DataError(
            "holds messages as Python prints them, as pandas writes lists to CSV; write them as JSON "
            "(in pandas: frame[column].map(json.dumps)), or save the table as parquet"
        )
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        value = from_json(text)
    except DataError:
        return None
    said = value if isinstance(value, list) else [value]
    return value if said and all(map(_speaks, said)) else None


def _speaks(value: Any) -> bool:
    return isinstance(value, dict) and any(
        who in value and any(key in value for key in what) for who, what in _SPEAKS
    )


def read_messages(value: Any, unused: Counter[str]) -> Messages:
    """The messages of a list. `unused` counts keys that nothing reads, by names such as `messages[].timestamp`.

    Raises:
        EmptyRowError: there are none, or one says nothing.
        DataError: one is no message, or has a key whose meaning would be lost.
    """
    if not isinstance(value, (list, tuple)):
        raise DataError(f"is of type {type(value).__name__}, not a list of messages; {EXAMPLE}")
    if not value:
        raise EmptyRowError("is an empty list of messages")
    return tuple(read_message(item, unused) for item in value)


def read_message(value: Any, unused: Counter[str]) -> Message:
    """One message; see read_messages."""
    if not isinstance(value, Mapping):
        raise DataError(f"holds {shown(value)}, which is no message; {EXAMPLE}")
    given = {key: item for key, item in value.items() if item is not None}
    given = _from_sharegpt(given) if "from" in given and "role" not in given else given
    role = given.pop("role", None)
    if not isinstance(role, str) or not role.strip():
        raise DataError(f"holds a message without a role; {EXAMPLE}")
    check_text(role)
    role = _ROLES.get(role.strip().lower(), role)
    message: dict[str, Any] = {"role": "tool" if role == "function" else role}
    calls = _calls(given, message["role"], unused)
    message["content"] = _content(given.pop("content", None), message["role"], bool(calls), unused)
    if calls:
        message["tool_calls"] = calls
    for key in ("name", "tool_call_id", *REASONING):
        if key in given and (key in REASONING or says_something(given[key])):
            message[key] = _text(given[key], key)
        given.pop(key, None)
    _check_one_reasoning(message)
    if "weight" in given:
        message["weight"] = _weight(given.pop("weight"), message["role"])
    for key, item in given.items():
        if key in _MEDIA and says_something(item):
            raise DataError(f"holds a message with {key!r}, and only text is read here; remove it, or the row")
        if key not in _MEDIA:
            unused[f"messages[].{key}"] += 1
    return message


def text_of(message: Message) -> str:
    """What is said in a message, as one text; empty where it only calls tools."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] for part in content)


def said(message: Message) -> tuple[Any, ...]:
    """All that a message says, the same in each form that it may have; for whatever compares messages.

    Left out are ids, which differ wherever they are drawn, and the weight, which nobody reads.
    """
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or ()]
    thought = next((message[key] for key in REASONING if key in message), None)
    return message["role"], message.get("name"), text_of(message), thought, calls


def readable(message: Message) -> str:
    """What is said and called in a message, as people and judges read it: `lookup({"city": "Oslo"})` is a call."""
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    written = [f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})" for call in calls]
    return "\n".join(part for part in (text_of(message), *written) if part)


def _from_sharegpt(given: dict[str, Any]) -> dict[str, Any]:
    who = given.pop("from")
    role = _SHAREGPT_ROLES.get(who) if isinstance(who, str) else None
    if role is None:
        raise DataError(
            f"holds a message from {shown(who)}; ShareGPT's speakers are {', '.join(_SHAREGPT_ROLES)}: rename it, or "
            "write it with role and content"
        )
    key = "tool_calls" if who == "function_call" else "content"
    if "value" not in given:
        raise DataError(f"holds a message from {who!r} without a value; write {{\"from\": ..., \"value\": ...}}")
    return {"role": role, key: given.pop("value"), **given}


def _calls(given: dict[str, Any], role: str, unused: Counter[str]) -> list[dict[str, Any]]:
    """The tool calls of a message, also in OpenAI's older word; the keys are taken out of it."""
    calls, call = given.pop("tool_calls", None), given.pop("function_call", None)
    if not says_something(calls) and not says_something(call):
        return []
    if says_something(calls) and says_something(call):
        raise DataError("holds a message with both 'tool_calls' and 'function_call'; keep one of them")
    if role != "assistant":
        raise DataError(f"holds a message of {role!r} with tool calls, which are the assistant's to make")
    return calls_of(calls if says_something(calls) else call, unused)


def _content(content: Any, role: str, calls: bool, unused: Counter[str]) -> Any:
    """Text, parts of text, or None beside tool calls."""
    if content is None and calls:
        return None
    if isinstance(content, (list, tuple)):
        content = [_part(part, unused) for part in content]
        is_blank = not any(part["text"].strip() for part in content)
    elif isinstance(content, str):
        check_text(content)
        is_blank = not content.strip()
    else:
        raise DataError(f"holds a message without content that is text; {EXAMPLE}")
    # A tool may well have nothing to say, and who calls one need not speak.
    if is_blank and not calls and role != "tool":
        raise EmptyRowError("holds a message without content")
    return content


def _part(part: Any, unused: Counter[str]) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise DataError(f'holds a part {shown(part)} of a message; write {{"type": "text", "text": "Hello"}}')
    given = {key: item for key, item in part.items() if item is not None}
    kind, text = given.pop("type", "text"), given.pop("text", None)
    if kind != "text":
        raise DataError(f"holds a part of type {shown(kind)}, and only text is read here; remove it, or the row")
    if not isinstance(text, str):
        raise DataError("holds a part of a message without content that is text; write it as \"text\"")
    check_text(text)
    for key, item in given.items():
        if key in _MEDIA and says_something(item):
            raise DataError(f"holds a part with {key!r}, and only text is read here; remove it, or the row")
        if key not in _MEDIA:
            unused[f"messages[].content[].{key}"] += 1
    return {"type": "text", "text": text}


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"holds a message whose {key!r} is {shown(value)}, not text")
    check_text(value)
    return value


def _check_one_reasoning(message: Message) -> None:
    given = {key: message[key] for key in REASONING if key in message}
    if len(set(given.values())) > 1:
        raise DataError(f"holds a message with {' and '.join(map(repr, given))}, which differ; keep one of them")


def _weight(value: Any, role: str) -> int:
    """1: the turn is learned; 0: it is not, as nothing is that is not the assistant's."""
    if isinstance(value, (int, float)) and value in ((0, 1) if role == "assistant" else (0,)):
        return int(value)
    raise DataError(
        f"holds a message of {role!r} with the weight {shown(value)}; a weight is 0 or 1, and 1 on the assistant's "
        "turns only; mend it, or remove the key"
    )
