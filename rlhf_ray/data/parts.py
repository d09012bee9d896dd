"""What a record says: part by part (the prompt, each answer), and as a key. For whatever compares records.

One question may be written as a text, an HH dialogue, an instruction, messages, or messages in parts: it stays one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from rlhf_ray.data.asking import as_messages
from rlhf_ray.data.chat import Chat, Prompt
from rlhf_ray.data.messages import said, text_of
from rlhf_ray.data.types import AnswerRow, ConversationRow, PreferenceRow, RankedRow, Record, TextRow, prompt_of

# Keys of messages that are no text of anybody's.
_MARKS = ("role", "type", "id", "tool_call_id", "weight")


def parts_of(record: Record) -> tuple[str, ...]:
    """The prompt, then the answers, in the record's order. A label is a part of its own, so that labels must agree; so
    are the tools and variables that the row gives the chat template, by their digest.

    Of a conversation the last message is the answer.
    """
    if isinstance(record, TextRow):
        return (record.text, *_label(record.label))
    if isinstance(record, ConversationRow):
        messages = record.chat.messages
        before = record.chat.with_messages(messages[:-1])
        return (written(before), written(messages[-1]), *_beside(before))
    prompt = written(prompt_of(record))
    return (prompt, *map(written, answers_of(record)), *_beside(record.prompt), *_label(getattr(record, "label", None)))


def answers_of(record: Record) -> tuple[Any, ...]:
    """The answers of a record that has a prompt; best first."""
    if isinstance(record, PreferenceRow):
        return (record.chosen, record.rejected)
    if isinstance(record, RankedRow):
        return record.completions
    return (record.completion,) if isinstance(record, AnswerRow) else ()


def prompt_key(prompt: Prompt) -> bytes:
    """A digest of what is asked, the same in every form."""
    return _digest(_asked(prompt))


def record_key(record: Record) -> bytes:
    """A digest of all that a record says, the same in every form; what it weighs differently is something else."""
    if isinstance(record, TextRow):
        return _digest(("text", record.text, record.label))
    if isinstance(record, ConversationRow):
        messages = record.chat.messages
        weights = [message.get("weight", 1) for message in messages if message["role"] == "assistant"]
        if weights == [1] and messages[-1]["role"] == "assistant":
            # With one answer, at its end, a conversation is a prompt and its completion.
            record = AnswerRow(prompt_of(record), messages[-1:])
        else:
            return _digest(("conversation", _asked(record.chat), weights))
    answers = [_answered(answer) for answer in answers_of(record)]
    marks = [getattr(record, name, None) for name in ("label", "margin", "scores")]
    return _digest((type(record).__name__, _asked(record.prompt), answers, marks))


def written(value: Any) -> str:
    """All text in a prompt or an answer, tool calls included."""
    return "\n".join(_texts(value))


def _asked(prompt: Prompt) -> tuple[Any, ...]:
    messages = [said(message) for message in as_messages(prompt)]
    return (messages, prompt.tools, prompt.template_args) if isinstance(prompt, Chat) else (messages, (), None)


def _answered(answer: Any) -> list[Any]:
    messages = ({"role": "assistant", "content": answer},) if isinstance(answer, str) else answer
    return [said(message) for message in messages]


def _digest(value: Any) -> bytes:
    # A digest, not the text: a set of texts would hold the whole dataset once more.
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).digest()


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key == "content" and "role" in value:
                yield text_of(value)  # one text, however many parts it is written in
            elif key not in _MARKS:
                yield from _texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)
    elif isinstance(value, Chat):
        yield from _texts(value.messages)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _texts(getattr(value, field.name))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield str(value)


def _beside(prompt: Prompt) -> tuple[str, ...]:
    if not isinstance(prompt, Chat) or not (prompt.tools or prompt.template_args):
        return ()
    return (_digest((prompt.tools, prompt.template_args)).hex(),)


def _label(label: int | None) -> tuple[str, ...]:
    return () if label is None else (f"label {label}",)
