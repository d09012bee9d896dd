"""What is written in a record, part by part: the prompt, and each answer. For whatever compares records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from rlhf_ray.data.chat import Chat
from rlhf_ray.data.types import AnswerRow, ConversationRow, PreferenceRow, RankedRow, Record, TextRow, prompt_of

# Keys of messages that are no text of anybody's.
_MARKS = ("role", "type", "id", "tool_call_id", "weight")


def parts_of(record: Record) -> tuple[str, ...]:
    """The prompt, then the answers, in the record's order; a label is a part of its own, so that labels must agree.

    Of a conversation the last message is the answer.
    """
    if isinstance(record, TextRow):
        return (record.text, *_label(record.label))
    if isinstance(record, ConversationRow):
        messages = record.chat.messages
        before = record.chat.with_messages(messages[:-1])
        return (written(before), written(messages[-1]))
    prompt = written(prompt_of(record))
    return (prompt, *map(written, answers_of(record)), *_label(getattr(record, "label", None)))


def answers_of(record: Record) -> tuple[Any, ...]:
    """The answers of a record that has a prompt; best first."""
    if isinstance(record, PreferenceRow):
        return (record.chosen, record.rejected)
    if isinstance(record, RankedRow):
        return record.completions
    return (record.completion,) if isinstance(record, AnswerRow) else ()


def written(value: Any) -> str:
    """All text in a prompt or an answer, tool calls included."""
    return "\n".join(_texts(value))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in _MARKS:
                yield from _texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)
    elif isinstance(value, Chat):
        # What the row gives the template beside the messages is often the same in every row.
        yield from _texts(value.messages)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _texts(getattr(value, field.name))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield str(value)


def _label(label: int | None) -> tuple[str, ...]:
    return () if label is None else (f"label {label}",)
