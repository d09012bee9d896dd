"""One row's values by role, checked: texts, messages, numbers, labels. Every complaint names file and line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from rlhf_ray.config.data import ColumnsConfig
from rlhf_ray.data.chat import Messages
from rlhf_ray.data.rows import Row
from rlhf_ray.errors import DataError

Text: TypeAlias = str | Messages

USUAL = ColumnsConfig()
_ALSO_CALLED = {"messages": "conversations"}  # ShareGPT's name, whose messages say `from` and `value`
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
_EXAMPLE = 'write a list like [{"role": "user", "content": "Hello"}]'


class EmptyRowError(DataError):
    """A row whose text is empty: the one fault that cleaning may leave out and count."""


class Columns:
    """A row as its type reads it: each role's value, under the name that the settings give or the usual one."""

    def __init__(self, row: Row, names: ColumnsConfig = USUAL):
        self.row, self._names = row, names

    def name(self, role: str) -> str:
        given = getattr(self._names, role) if role in ColumnsConfig.model_fields else None
        other = _ALSO_CALLED.get(role)
        if given is None and other in self.row.fields and role not in self.row.fields:
            return other
        return given or role

    def has(self, role: str) -> bool:
        return self.row.fields.get(self.name(role)) is not None  # a table has None where a row lacks the column

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.row.where}: {problem}")

    def empty(self, problem: str) -> EmptyRowError:
        return EmptyRowError(f"{self.row.where}: {problem}; remove the row, or fill it")

    def value(self, role: str) -> Any:
        name = self.name(role)
        if name not in self.row.fields:
            raise self.error(
                f"no field {name!r}; the row has {', '.join(map(repr, self.row.fields)) or 'none'}; "
                "name another with data.columns (data.field for prompts), or mend the row"
            )
        return self.row.fields[name]

    def text(self, role: str) -> str:
        """A text with something in it."""
        return self.checked_text(self.value(role), role)

    def optional_text(self, role: str) -> str:
        """A text; empty where the row has none."""
        value = self.value(role) if self.has(role) else ""
        return "" if isinstance(value, str) and not value.strip() else self.checked_text(value, role)

    def text_or_messages(self, role: str) -> Text:
        return self.checked(self.value(role), role)

    def messages(self, role: str) -> Messages:
        return self._messages(_from_json(self.value(role)), role)

    def listed(self, role: str) -> Sequence[Any]:
        value = _from_json(self.value(role))
        if not isinstance(value, (list, tuple)):
            raise self.error(f"field {self.name(role)!r} is of type {type(value).__name__}, not a list")
        return value

    def number(self, role: str) -> float:
        return self.checked_number(self.value(role), role)

    def label(self, role: str = "label") -> int:
        """A class: 0, 1, ...; true is 1."""
        value = self.value(role)
        if isinstance(value, str):  # a CSV file has nothing but text
            word = value.strip().lower()
            value = int(word) if word.isdecimal() else {"true": 1, "false": 0}.get(word, value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or value < 0:
            raise self.error(
                f"field {self.name(role)!r} is {value!r}; a label is true, false, or a class 0, 1, 2, ...; "
                "mend it, or set the type to one that reads no label"
            )
        return int(value)

    def checked(self, value: Any, role: str) -> Text:
        if isinstance(value, (list, tuple)):
            return self._messages(value, role)
        return self.checked_text(value, role)

    def checked_number(self, value: Any, role: str) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise self.error(f"field {self.name(role)!r} has {value!r}, not a finite number; mend the row")
        return number

    def checked_text(self, value: Any, role: str) -> str:
        name = self.name(role)
        if not isinstance(value, str):
            raise self.error(
                f"field {name!r} is of type {type(value).__name__}, not text; give a string or chat messages"
            )
        if not value.strip():
            raise self.empty(f"field {name!r} is empty")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.error(
                f"field {name!r} holds half of a character (position {error.start}), which no tokenizer reads; "
                "remove it, or write the file again from its source"
            ) from error
        return value

    def _messages(self, value: Any, role: str) -> Messages:
        name = self.name(role)
        if not isinstance(value, (list, tuple)):
            raise self.error(f"field {name!r} is of type {type(value).__name__}, not a list of messages; {_EXAMPLE}")
        if not value:
            raise self.empty(f"field {name!r} is an empty list of messages")
        return tuple(self._message(message, role) for message in value)

    def _message(self, message: Any, role: str) -> Mapping[str, Any]:
        name = self.name(role)
        message = _openai(message) if isinstance(message, dict) else message
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise self.error(f"field {name!r} holds a message without a role; {_EXAMPLE}")
        content = message.get("content")
        if message.get("tool_calls") and not content:
            return message
        if isinstance(content, str) and not content.strip():
            raise self.empty(f"field {name!r} holds a message without content")
        if not isinstance(content, str):
            raise self.error(f"field {name!r} holds a message without content that is text; {_EXAMPLE}")
        self.checked_text(content, role)
        return message


def _from_json(value: Any) -> Any:
    """A CSV file has no lists: there they are written as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            return value
    return value


def _openai(message: dict[str, Any]) -> dict[str, Any]:
    """A message of ShareGPT's in OpenAI's words; a table's None values are left out (no tool calls is not `None`)."""
    if "from" in message and "value" in message:
        return {"role": _SHAREGPT_ROLES.get(message["from"], message["from"]), "content": message["value"]}
    return {key: value for key, value in message.items() if value is not None}
